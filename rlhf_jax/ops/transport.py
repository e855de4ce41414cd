"""Optimal transport between two samples on the line, whose plan for any convex cost is to sort both."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from rlhf_jax.types import Array


def optimal_plan(values: Array, others: Array, real: Array) -> Array:
    """For each row i the row j such that others[j] has the rank that values[i] has, [B] int32, a permutation.

    Rows that are not real come last in both orders, so that they are matched among themselves. Equal values rank by row.

    Args:
      values: [B] float; may hold anything where not real.
      others: [B] float; may hold anything where not real.
      real: [B] bool.
    """
    chex.assert_rank([values, others, real], 1)
    chex.assert_equal_shape([values, others, real])
    rank = jnp.argsort(jnp.argsort(jnp.where(real, values, jnp.inf)))
    return jnp.argsort(jnp.where(real, others, jnp.inf))[rank]
