"""Monte-Carlo estimators of KL(π ‖ ref) from log-ratios of sampled tokens, unreduced.

Each takes x = log π(a) − log ref(a) of an action a drawn from π. Which one to use depends on where it is used, because value and
gradient are separate matters (all three lines are tests, by enumeration of a small vocabulary):

    k1 = x               value unbiased;   gradient as a loss: zero in expectation     → belongs in the reward (PPO)
    k2 = x² / 2          value biased;     gradient as a loss: ∇ KL(π ‖ ref)
    k3 = e⁻ˣ − 1 + x     value unbiased, ≥ 0, low variance;   gradient as a loss: ∇ KL(ref ‖ π)   → GRPO's penalty

See: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html); gradients: Tang & Munos 2025 (arXiv:2506.09477).
Deviation: `exp` of a log-ratio saturates at e⁶⁰, so that values and gradients stay finite in float32.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from rlhf_jax.types import Array

MAX_LOG_RATIO = 60.0  # nats; e^60 ≈ 1e26 leaves float32 room for an advantage and a sum over tokens


def exp_ratio(log_ratio: Array) -> Array:
    """e^log_ratio, saturating at e⁶⁰ with zero gradient beyond.

    An infinite ratio on the branch that a minimum did not take would still turn the gradient into 0 · ∞ = NaN.

    Args:
      log_ratio: any shape, float, nats.
    """
    chex.assert_type(log_ratio, float)
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def k1(log_ratio: Array) -> Array:
    """k1 = x, nats: unbiased, of either sign, of high variance.

    Args:
      log_ratio: x = log π − log ref at tokens drawn from π, any shape, nats.

    Returns:
      The same shape.
    """
    chex.assert_type(log_ratio, float)
    return log_ratio


def k2(log_ratio: Array) -> Array:
    """k2 = x² / 2, nats: biased in value, yet its expected gradient is that of KL(π ‖ ref).

    Args:
      log_ratio: x = log π − log ref at tokens drawn from π, any shape, nats.

    Returns:
      The same shape, ≥ 0.
    """
    chex.assert_type(log_ratio, float)
    return 0.5 * jnp.square(log_ratio)


def k3(log_ratio: Array) -> Array:
    """k3 = e⁻ˣ − 1 + x, nats: unbiased and never negative.

    Args:
      log_ratio: x = log π − log ref at tokens drawn from π, any shape, nats.

    Returns:
      The same shape, ≥ 0.

    See: DeepSeekMath (arXiv:2402.03300), eq. 4.
    """
    chex.assert_type(log_ratio, float)
    # expm1 keeps the digits of small x, where e⁻ˣ − 1 and x cancel; the rounding left over may not go below zero.
    return jnp.maximum(jnp.expm1(jnp.minimum(-log_ratio, MAX_LOG_RATIO)) + log_ratio, 0.0)


def from_reference(log_ratio: Array) -> Array:
    """1 − e⁻ˣ (1 + x), nats: the other direction, KL(ref ‖ π), from tokens drawn from π by importance weights r = e⁻ˣ = ref/π; unbiased, ≥ 0.

    It is r log r less r − 1, whose expectation is 0.

    Args:
      log_ratio: x = log π − log ref at tokens drawn from π, any shape, nats.

    Returns:
      The same shape, ≥ 0.
    """
    chex.assert_type(log_ratio, float)
    ratio = exp_ratio(-log_ratio)
    return jnp.maximum(-jnp.expm1(jnp.minimum(-log_ratio, MAX_LOG_RATIO)) - log_ratio * ratio, 0.0)


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}  # by the name that a config gives
