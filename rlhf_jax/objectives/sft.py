"""SFT: maximum likelihood of the response tokens, with an optional z-loss.

    L = mean over the batch's response tokens of  −log π(y_t | x, y_<t)  +  z_loss · (log Σ_v exp z_v)²

Use: teach a base model to answer, from demonstrations; where nearly every alignment begins.
See: Ouyang et al. 2022 (arXiv:2203.02155), section 3.5; the z-loss is Chowdhery et al. 2022, PaLM (arXiv:2204.02311), section 5.
Deviation: none. The mean is over the tokens of the global batch, so a token weighs the same in a long response as in a short one.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.ops import vocab
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.types import Array, Mean, Sequences

DEFAULTS = {"z_loss": 0.0}
RANGES = {"z_loss": (0.0, math.inf)}


def nll_loss(logps: Array) -> Array:
    """Unreduced negative log-likelihood, −log π, [B, T] nats.

    Args:
      logps: [B, T] nats.
    """
    chex.assert_rank(logps, 2)
    return -logps


def z_loss_term(lse: Array, *, z_loss: float) -> Array:
    """z_loss · lse²: keeps the softmax's normaliser near 1, [B, T] nats².

    Args:
      lse: [B, T] log Σ_v exp z_v of the logits that predict each token.
      z_loss: coefficient, ≥ 0; PaLM used 1e-4.

    See: Chowdhery et al. 2022, section 5.
    """
    chex.assert_rank(lse, 2)
    return z_loss * jnp.square(lse)


def loss(nets: Any, batch: Sequences, keys: Array | None, *, z_loss: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    mask = loss_tokens(batch)
    out = nets.policy(batch, keys, want=(vocab.logps, vocab.lse) if z_loss else (vocab.logps,))
    terms = {"nll": Mean.of(nll_loss(out.logps), mask)}
    if z_loss:
        terms["z_loss"] = Mean.of(z_loss_term(out.lse, z_loss=z_loss), mask)
    return terms, {}
