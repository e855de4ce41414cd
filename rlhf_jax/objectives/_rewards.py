"""What the reward models on labelled tokens share: which labels count."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from rlhf_jax.types import Array, Labelled


def label_weights(batch: Labelled) -> Array:
    """The weight of each label, zero on padding whatever stands there, [B, T].

    Args:
      batch: the labelled rows.
    """
    chex.assert_equal_shape([batch.weights, batch.targets, batch.seqs.segment_ids])
    return jnp.where(batch.seqs.segment_ids != 0, batch.weights, 0.0)
