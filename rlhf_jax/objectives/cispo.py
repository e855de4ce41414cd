"""CISPO: a policy gradient that caps the importance weight instead of the update, so that no token loses its gradient.

    L = −1/Σ_i |o_i| Σ_i Σ_t sg[ clip(ρ_t, 1 − clip_low, 1 + clip_high) ] A_i log π(o_t)
    A_i = (r_i − mean(r)) / (std(r) + eps)   over the G samples of one prompt

Use: several updates per rollout on long reasoning, where PPO's clip drops the rare tokens that turn an argument.
See: MiniMax 2025, MiniMax-M1, eq. 4 and 5 (arXiv:2506.13585); a cap of 5: Khatri et al. 2025, ScaleRL (arXiv:2510.13786).
Deviation: none; clip_low = 1 is no lower bound, as in the paper's runs, and the cap is 1 + clip_high, where TRL's epsilon_high is the cap itself.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import evaluate, penalties, token_means
from rlhf_jax.objectives._rollouts import clip_metrics
from rlhf_jax.ops.importance import LEVELS
from rlhf_jax.ops.kl import exp_ratio
from rlhf_jax.types import Array, Mean, Rollout

__all__ = ["cispo_loss", "loss", "prepare"]

NEEDS = _groups.NEEDS
DEFAULTS = {**_groups.DEFAULTS, "clip_low": 1.0, "clip_high": 4.0, "ratio_level": "token"}
RANGES = {**_groups.RANGES, "ratio_level": LEVELS, "clip_low": (0.0, 1.0), "clip_high": (0.0, math.inf)}


def cispo_loss(logps: Array, log_ratios: Array, advantages: Array, *, clip_low: float, clip_high: float) -> Array:
    """Unreduced loss −sg[ clip(ρ, 1 − clip_low, 1 + clip_high) ] A log π, [B, T].

    Args:
      logps: log π, [B, T] nats.
      log_ratios: log ρ, [B, T] nats; no gradient goes through.
      advantages: [B, T], held fixed.
      clip_low: how far the weight may fall below 1, [0, 1]; 1 = no bound.
      clip_high: how far the weight may rise above 1, ≥ 0.

    See: MiniMax 2025, eq. 4 and 5.
    """
    chex.assert_rank([logps, log_ratios, advantages], 2)
    chex.assert_equal_shape([logps, log_ratios, advantages])
    weights = jax.lax.stop_gradient(jnp.clip(exp_ratio(log_ratios), 1.0 - clip_low, 1.0 + clip_high))
    return -weights * advantages * logps


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, clip_low: float, clip_high: float, ratio_level: str, off_policy_kl: float,
    beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool, entropy_coef: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    now = evaluate(nets, batch, keys, ratio_level=ratio_level, off_policy_kl=off_policy_kl)
    policy = cispo_loss(now.logps, now.log_ratios, now.advantages, clip_low=clip_low, clip_high=clip_high)
    terms = {"policy": token_means(policy, now)} | penalties(
        now, token_means, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
    ratios = exp_ratio(now.log_ratios)
    return terms, now.metrics() | clip_metrics(ratios < 1.0 - clip_low, ratios > 1.0 + clip_high, now.mask)
