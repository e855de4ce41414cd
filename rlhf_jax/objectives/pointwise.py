"""Pointwise reward model: regression of a scalar reward on ratings of single responses.

    L = ( r(x, y) − s )²,   s the response's rating

Use: responses come with scores on one scale instead of comparisons; the reward keeps that scale.
See: Wang et al. 2024, HelpSteer2 (arXiv:2406.08673).
Deviation: none; the squared error without a factor ½. The paper regresses several attributes at once, this objective one.
"""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives._rewards import label_weights
from rlhf_jax.types import Array, Labelled, Mean

DATA = ("rating",)
DEFAULTS: dict[str, Any] = {}


def squared_error(scores: Array, targets: Array) -> Array:
    """Unreduced (r − s)², [B, T].

    Args:
      scores: r, read after each token, [B, T].
      targets: s, [B, T].
    """
    chex.assert_equal_shape([scores, targets])
    return jnp.square(scores - targets)


def loss(nets: Any, batch: Labelled, keys: Array | None) -> tuple[dict[str, Mean], dict[str, Mean]]:
    scores, weights = nets.reward(batch.seqs, keys).scores, label_weights(batch)  # [B, T] each
    metrics = {"reward/mean": Mean.of(scores, weights), "reward/error": Mean.of(jnp.abs(scores - batch.targets), weights)}
    return {"pointwise": Mean.of(squared_error(scores, batch.targets), weights)}, metrics
