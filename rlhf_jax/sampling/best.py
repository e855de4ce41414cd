"""Best-of-n: of n samples of each prompt, the one with the highest score.

It moves the policy away from itself by at most

    KL(best of n ‖ policy) ≤ log n − (n − 1)/n   nats per response,

whatever the scores, with equality where no two responses are alike and no two scores tie. A tie goes to the first sample; a NaN score never wins
against a number, and a prompt without any number keeps its first sample, with NaN for its score.

See: Beirami et al. 2024, theorem 1 (arXiv:2401.01879); the formula itself: Stiennon et al. 2020, appendix G.3 (arXiv:2009.01325).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import chex
import jax.numpy as jnp

from rlhf_jax.types import Array


class Best(NamedTuple):
    """The chosen samples, and what all were worth."""

    row: Array  # [B / n] int32, the row of each prompt's chosen sample
    score: Array  # [B / n] float32, its score
    scores: Array  # [B / n, n] float32, all of them


def best_of(scores: Array, *, n: int) -> Best:
    """The best of each n neighbours.

    Args:
      scores: [B], NaN where there is none; the n samples of a prompt are neighbours.
      n: samples per prompt, divides B.
    """
    chex.assert_rank(scores, 1)
    chex.assert_is_divisible(scores.shape[0], n)
    groups = jnp.asarray(scores, jnp.float32).reshape(-1, n)
    rank = jnp.where(jnp.isnan(groups), -jnp.inf, jnp.maximum(groups, jnp.finfo(jnp.float32).min))
    chosen = jnp.argmax(rank, axis=1).astype(jnp.int32)
    return Best(jnp.arange(groups.shape[0], dtype=jnp.int32) * n + chosen, jnp.take_along_axis(groups, chosen[:, None], axis=1)[:, 0], groups)


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n, nats: the most by which choosing among n samples moves a policy.

    Args:
      n: samples, at least 1.
    """
    return math.log(n) - (n - 1) / n
