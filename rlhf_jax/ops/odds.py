"""Odds of a probability, in log space."""

from __future__ import annotations

import math

import chex
import jax.numpy as jnp

from rlhf_jax.types import Array

NEAREST_TO_ONE = -1e-6  # nats; at a probability of 1 the odds are infinite


def log1mexp(x: Array) -> Array:
    """log(1 − eˣ) of x < 0, accurate at both ends.

    Args:
      x: any shape, float, below 0.

    See: Mächler 2012, "Accurately computing log(1 − exp(−|a|))".
    """
    chex.assert_type(x, float)
    near = x > -math.log(2.0)
    # Each branch gets an argument at which it is finite: where the other is taken, its gradient is multiplied by 0.
    small, large = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def log_odds(log_p: Array) -> Array:
    """log( p / (1 − p) ), with a zero gradient where p is within 1e-6 of 1.

    Args:
      log_p: log p, any shape, nats, ≤ 0.

    Returns:
      The same shape, at most 13.8.
    """
    chex.assert_type(log_p, float)
    log_p = jnp.minimum(log_p, NEAREST_TO_ONE)
    return log_p - log1mexp(log_p)
