"""Divergences between a student's and a teacher's next-token distribution, summed over the vocabulary.

    forward_kl       KL(T ‖ S)                                  covers all that the teacher might say
    reverse_kl       KL(S ‖ T)                                  keeps to what the teacher is sure of
    generalised_jsd  β KL(T ‖ M) + (1 − β) KL(S ‖ M),  M = β T + (1 − β) S      between the two, bounded

All read logits, so a temperature is a division beforehand; log-probs are logits too. Nothing is detached here.

See: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (arXiv:2306.13649), section 2 and eq. 1.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.types import Array

FLOOR = -1e30  # nats; a token that a logit of −inf rules out: its mass is 0 all the same, and no slope becomes 0 · ∞


def _log_probs(student: Array, teacher: Array) -> tuple[Array, Array]:
    s, t = (jnp.maximum(jax.nn.log_softmax(x.astype(jnp.float32)), FLOOR) for x in (student, teacher))
    return s, t


def _kl(p: Array, q: Array) -> Array:
    """Σ_v p_v (log p_v − log q_v) of log-probs."""
    return (jnp.exp(p) * (p - q)).sum(-1)


def forward_kl(student: Array, teacher: Array) -> Array:
    """KL(T ‖ S) = Σ_v T_v log(T_v / S_v), nats.

    Args:
      student: [..., V] logits.
      teacher: [..., V] logits.

    Returns:
      [...], ≥ 0 but for rounding.
    """
    chex.assert_equal_shape([student, teacher])
    s, t = _log_probs(student, teacher)
    return _kl(t, s)


def reverse_kl(student: Array, teacher: Array) -> Array:
    """KL(S ‖ T) = Σ_v S_v log(S_v / T_v), nats.

    Args:
      student: [..., V] logits.
      teacher: [..., V] logits.

    Returns:
      [...], ≥ 0 but for rounding.
    """
    chex.assert_equal_shape([student, teacher])
    s, t = _log_probs(student, teacher)
    return _kl(s, t)


def generalised_jsd(student: Array, teacher: Array, *, beta: float) -> Array:
    """JSD(β) = β KL(T ‖ M) + (1 − β) KL(S ‖ M),  M = β T + (1 − β) S, nats.

    It is 0 at β = 0 and at β = 1. Near them, JSD / β tends to KL(T ‖ S) and JSD / (1 − β) to KL(S ‖ T); β = ½ is the symmetric
    Jensen–Shannon divergence, at most log 2.

    Args:
      student: [..., V] logits.
      teacher: [..., V] logits.
      beta: β, the teacher's share of the mixture, (0, 1).

    Returns:
      [...], ≥ 0 but for rounding.

    See: Agarwal et al. 2024, eq. 1.
    """
    chex.assert_equal_shape([student, teacher])
    s, t = _log_probs(student, teacher)
    mixture = jnp.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    return beta * _kl(t, mixture) + (1.0 - beta) * _kl(s, mixture)
