"""LM: maximum likelihood of every token of plain text, from scratch or continued.

    L = mean over the batch's tokens of  −(1 − ε) log π(x_t | x_<t)  −  ε/V Σ_v log π(v | x_<t)  +  z_loss · (log Σ_v exp z_v)²

Use: train from scratch, or go on with plain text of a domain before SFT.
See: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", eq. 1; ε and the z-loss as in SFT.
Deviation: none; the maths is SFT's, `loss_mask` is ignored, and a segment's first token, which nothing predicts, does not count.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives import sft
from rlhf_jax.types import Array, Mean, Sequences

DEFAULTS = {"label_smoothing": 0.0, "z_loss": 0.0}
RANGES = {"label_smoothing": (0.0, 1.0), "z_loss": (0.0, math.inf)}


def loss(
    nets: Any, batch: Sequences, keys: Array | None, *, label_smoothing: float, z_loss: float
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    chex.assert_rank(batch.tokens, 2)
    everywhere = batch.replace(loss_mask=jnp.ones_like(batch.loss_mask), loss_positions=None)
    return sft.loss(nets, everywhere, keys, label_smoothing=label_smoothing, z_loss=z_loss)
