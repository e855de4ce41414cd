"""GMPO: GRPO on the geometric mean of a completion's ratios, each clipped in log space, so that no outlier rules the update.

    L = −1/G Σ_i exp( 1/|o_i| Σ_t clipped(log ρ_t) ) A_i,   clipped(x) = min(x, clip_high) if A_i > 0, else max(x, −clip_low)
    A_i = (r_i − mean(r)) / (std(r) + eps)   over the G samples of one prompt

Use: GRPO with unstable ratios that should explore more: the clip is far wider, e^±0.4.
See: Zhao et al. 2025 (arXiv:2507.20673).
Deviation: none; the paper's min of both sides under the sign of A is written out. The bounds are nats, not differences from 1. Tokens whose
advantage was set to 0 (an entropy quantile, a masked correction) take no part in the means; where a correction per token makes A_i differ within
a row, it enters by its mean.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import evaluate, penalties, sequence_means
from rlhf_jax.objectives._rollouts import clip_metrics
from rlhf_jax.ops.kl import exp_ratio
from rlhf_jax.ops.masking import masked_mean
from rlhf_jax.types import Array, Mean, Rollout

__all__ = ["gmpo_loss", "loss", "prepare"]

NEEDS = _groups.NEEDS
DEFAULTS = {**_groups.DEFAULTS, "clip_low": 0.4, "clip_high": 0.4}
RANGES = {**_groups.RANGES, "clip_low": (0.0, math.inf), "clip_high": (0.0, math.inf)}


def gmpo_loss(log_ratios: Array, advantages: Array, mask: Array, *, clip_low: float, clip_high: float) -> Array:
    """Unreduced loss of each row: −exp( mean of the clipped log-ratios ) · A, [B].

    Args:
      log_ratios: log ρ, [B, T] nats.
      advantages: [B, T], held fixed, of one sign within a row.
      mask: [B, T] bool, the policy's own tokens.
      clip_low: how far a log-ratio may fall below 0, nats, ≥ 0.
      clip_high: how far a log-ratio may rise above 0, nats, ≥ 0.

    See: Zhao et al. 2025.
    """
    chex.assert_rank([log_ratios, advantages, mask], 2)
    chex.assert_equal_shape([log_ratios, advantages, mask])
    clipped = jnp.where(advantages > 0, jnp.minimum(log_ratios, clip_high), jnp.maximum(log_ratios, -clip_low))
    counted = mask & (advantages != 0)
    return -exp_ratio(masked_mean(clipped, counted)) * masked_mean(advantages, counted)


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, clip_low: float, clip_high: float, off_policy_kl: float,
    beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool, entropy_coef: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    now = evaluate(nets, batch, keys, ratio_level="token", off_policy_kl=off_policy_kl)
    policy = gmpo_loss(now.log_ratios, now.advantages, now.mask, clip_low=clip_low, clip_high=clip_high)
    terms = {"policy": Mean.of(policy, now.rows)} | penalties(
        now, sequence_means, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
    below, above = (now.advantages < 0) & (now.log_ratios < -clip_low), (now.advantages > 0) & (now.log_ratios > clip_high)
    return terms, now.metrics() | clip_metrics(below, above, now.mask)
