"""SAPO: GRPO with a smooth gate in place of the clip: a token's gradient fades as its ratio leaves 1, and never stops at once.

    L = −1/G Σ_i 1/|o_i| Σ_t 4/τ σ( τ (ρ_t − 1) ) A_i,   τ = temperature_pos if A_i > 0, else temperature_neg
    A_i = (r_i − mean(r)) / (std(r) + eps)   over the G samples of one prompt

Use: several updates per rollout, also with mixtures of experts, where a hard clip wastes most tokens of a drifting sequence.
See: Gao et al. 2025 (arXiv:2511.20347).
Deviation: none; at ρ = 1 the gradient is GRPO's, whatever τ is. A higher τ for A ≤ 0 makes pushing down fade faster.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import evaluate, penalties, sequence_means
from rlhf_jax.ops.importance import LEVELS
from rlhf_jax.ops.kl import exp_ratio
from rlhf_jax.types import Array, Mean, Rollout

__all__ = ["loss", "prepare", "sapo_loss"]

NEEDS = _groups.NEEDS
DEFAULTS = {**_groups.DEFAULTS, "temperature_pos": 1.0, "temperature_neg": 1.05, "ratio_level": "token"}
RANGES = {**_groups.RANGES, "ratio_level": LEVELS, "temperature_pos": (1e-6, math.inf), "temperature_neg": (1e-6, math.inf)}


def sapo_loss(log_ratios: Array, advantages: Array, *, temperature_pos: float, temperature_neg: float) -> Array:
    """Unreduced loss −4/τ σ( τ (ρ − 1) ) A, [B, T].

    Args:
      log_ratios: log ρ, [B, T] nats.
      advantages: [B, T], held fixed.
      temperature_pos: τ where the advantage is positive, > 0: the higher, the narrower the gate.
      temperature_neg: τ elsewhere, > 0.

    See: Gao et al. 2025.
    """
    chex.assert_rank([log_ratios, advantages], 2)
    chex.assert_equal_shape([log_ratios, advantages])
    tau = jnp.where(advantages > 0, temperature_pos, temperature_neg)
    return -4.0 / tau * jax.nn.sigmoid(tau * (exp_ratio(log_ratios) - 1.0)) * advantages


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, temperature_pos: float, temperature_neg: float, ratio_level: str, off_policy_kl: float,
    beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool, entropy_coef: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    now = evaluate(nets, batch, keys, ratio_level=ratio_level, off_policy_kl=off_policy_kl)
    policy = sapo_loss(now.log_ratios, now.advantages, temperature_pos=temperature_pos, temperature_neg=temperature_neg)
    terms = {"policy": sequence_means(policy, now)} | penalties(
        now, sequence_means, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
    return terms, now.metrics()
