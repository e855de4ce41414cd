"""Scores of f-divergences: what DPO's log-ratio becomes when another divergence than KL(π ‖ ref) keeps the policy near the reference.

With t = π/ref and u = log t, a score is f'(t), shifted to be 0 at u = 0; a constant cancels in a margin.

    reverse_kl       u                        KL(π ‖ ref): DPO
    forward_kl       1 − e⁻ᵘ                  KL(ref ‖ π)
    jensen_shannon   log 2 + log σ(u)         bounded above
    alpha            (1 − e⁻ᵅᵘ) / α           between the two KLs: α → 0 is the first, α = 1 the second

See: Wang et al. 2023, "Beyond Reverse KL" (arXiv:2309.16240).
Deviation: exponentials saturate at e³⁰ with zero gradient beyond, so that values, gradients and their squared norm stay finite in float32.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.types import Array

MAX_EXPONENT = 30.0  # nats, half of ops.kl's: a slope reaches e^30 ≈ 1e13 here, and the squared norm of gradients of e^60 overflows float32


def reverse_kl_score(log_ratio: Array, *, alpha: float) -> Array:
    """u, of f(t) = t log t.

    Args:
      log_ratio: u = log π − log π_ref, any shape, nats.
      alpha: unused.
    """
    chex.assert_type(log_ratio, float)
    return log_ratio


def forward_kl_score(log_ratio: Array, *, alpha: float) -> Array:
    """1 − e⁻ᵘ, of f(t) = −log t.

    Args:
      log_ratio: u = log π − log π_ref, any shape, nats.
      alpha: unused.
    """
    chex.assert_type(log_ratio, float)
    return alpha_score(log_ratio, alpha=1.0)


def jensen_shannon_score(log_ratio: Array, *, alpha: float) -> Array:
    """log 2 + log σ(u) = log( 2t / (1 + t) ), of f(t) = t log t − (t + 1) log( (t + 1) / 2 ).

    Args:
      log_ratio: u = log π − log π_ref, any shape, nats.
      alpha: unused.
    """
    chex.assert_type(log_ratio, float)
    return math.log(2.0) + jax.nn.log_sigmoid(log_ratio)


def alpha_score(log_ratio: Array, *, alpha: float) -> Array:
    """(1 − e⁻ᵅᵘ) / α, its limit u at α = 0; of f(t) = (t¹⁻ᵅ − (1 − α) t − α) / (α (α − 1)).

    Args:
      log_ratio: u = log π − log π_ref, any shape, nats.
      alpha: α; above 0 it flattens large ratios, below 0 small ones.
    """
    chex.assert_type(log_ratio, float)
    if alpha == 0:
        return log_ratio
    return -jnp.expm1(jnp.minimum(-alpha * log_ratio, MAX_EXPONENT)) / alpha


SCORES = {"reverse_kl": reverse_kl_score, "forward_kl": forward_kl_score, "jensen_shannon": jensen_shannon_score, "alpha": alpha_score}
