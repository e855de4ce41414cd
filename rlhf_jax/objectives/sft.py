"""SFT: maximum likelihood of the response tokens, with optional label smoothing and z-loss.

    L = mean over the batch's response tokens of  −(1 − ε) log π(y_t | x, y_<t)  −  ε/V Σ_v log π(v | x, y_<t)  +  z_loss · (log Σ_v exp z_v)²

Use: teach a base model to answer, from demonstrations; where nearly every alignment begins.
See: Ouyang et al. 2022 (arXiv:2203.02155), section 3.5; the smoothing of weight ε = label_smoothing is Szegedy et al. 2016
(arXiv:1512.00567), section 7; the z-loss is Chowdhery et al. 2022, PaLM (arXiv:2204.02311), section 5.
Deviation: none. The mean is over the tokens of the global batch, so a token weighs the same in a long response as in a short one. The terms
are `nll`, which smoothing leaves as it is, and `smoothing`, what it adds: ε · (log π(y_t) − 1/V Σ_v log π(v)).
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.ops import vocab
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.types import Array, Mean, Sequences

DEFAULTS = {"label_smoothing": 0.0, "z_loss": 0.0}
RANGES = {"label_smoothing": (0.0, 1.0), "z_loss": (0.0, math.inf)}


def nll_loss(logps: Array) -> Array:
    """Unreduced negative log-likelihood, −log π, [B, T] nats.

    Args:
      logps: [B, T] nats.
    """
    chex.assert_rank(logps, 2)
    return -logps


def smoothing_term(logps: Array, mean_logps: Array, *, label_smoothing: float) -> Array:
    """ε · (log π(y_t) − 1/V Σ_v log π(v)): what turns the likelihood into that of a label smoothed by ε, [B, T] nats.

    Args:
      logps: log π(y_t), [B, T] nats.
      mean_logps: 1/V Σ_v log π(v) of the same distribution, [B, T] nats.
      label_smoothing: ε, the label's mass that is spread over the whole vocabulary, [0, 1]; 0 = off.

    See: Szegedy et al. 2016, section 7.
    """
    chex.assert_rank([logps, mean_logps], 2)
    chex.assert_equal_shape([logps, mean_logps])
    return label_smoothing * (logps - mean_logps)


def z_loss_term(lse: Array, *, z_loss: float) -> Array:
    """z_loss · lse²: keeps the softmax's normaliser near 1, [B, T] nats².

    Args:
      lse: [B, T] log Σ_v exp z_v of the logits that predict each token.
      z_loss: weight of the squared log-normaliser (log Σ_v exp z_v)², ≥ 0; PaLM's is 1e-4, 0 = off.

    See: Chowdhery et al. 2022, section 5.
    """
    chex.assert_rank(lse, 2)
    return z_loss * jnp.square(lse)


def loss(
    nets: Any, batch: Sequences, keys: Array | None, *, label_smoothing: float, z_loss: float
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    mask = loss_tokens(batch)
    smoothing, normaliser = (vocab.mean_logit,) * bool(label_smoothing), (vocab.lse,) * bool(label_smoothing or z_loss)
    out = nets.policy(batch, keys, want=(vocab.logps, *smoothing, *normaliser))
    terms = {"nll": Mean.of(nll_loss(out.logps), mask)}
    if label_smoothing:
        mean_logps = out.mean_logit - out.lse
        terms["smoothing"] = Mean.of(smoothing_term(out.logps, mean_logps, label_smoothing=label_smoothing), mask)
    if z_loss:
        terms["z_loss"] = Mean.of(z_loss_term(out.lse, z_loss=z_loss), mask)
    return terms, {}
