"""DFT: dynamic fine-tuning, maximum likelihood with each token weighted by its own probability.

    L = mean over the batch's response tokens of  −sg( π(y_t | x, y_<t) ) · log π(y_t | x, y_<t)

Use: SFT that generalises better where demonstrations hold tokens that the model finds absurd: their pull, which grows as 1/π in SFT, is taken away.
Start from a model that can do the task in part, because a token of probability near 0 is hardly learnt.
See: Wu et al. 2025, section 3 (arXiv:2508.05629).
Deviation: none; sg is the stop-gradient. The loss falls to 0 at π = 0 as well as at π = 1, so `logps/mean` tells how training goes.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.types import Array, Mean, Sequences

DEFAULTS: dict[str, Any] = {}


def dft_loss(logps: Array) -> Array:
    """Unreduced loss, −sg(π) · log π, [B, T] nats.

    Args:
      logps: log π of each token, [B, T] nats.

    See: Wu et al. 2025, section 3.
    """
    chex.assert_rank(logps, 2)
    return -jax.lax.stop_gradient(jnp.exp(logps)) * logps


def loss(nets: Any, batch: Sequences, keys: Array | None) -> tuple[dict[str, Mean], dict[str, Mean]]:
    mask = loss_tokens(batch)
    logps = nets.policy(batch, keys).logps
    return {"dft": Mean.of(dft_loss(logps), mask)}, {"logps/mean": Mean.of(logps, mask)}
