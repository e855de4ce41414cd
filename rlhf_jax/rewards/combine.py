"""Several rewards made one score: each component clipped, normalised over the batch if asked for, weighted; their sum is the score.

    score_i = Σ_c w_c · normalise_c( clip_c( r_ic ) )

Pure JAX over the global batch, so that it runs inside the fused iteration and after host rewards alike. A component that failed on a row is NaN
there: with the policy "default" another number takes its place, else the row's score is NaN, which objectives treat like a filler row. Deviation:
normalisation is by this batch's own moments. There are no running ones, which would be one more state to checkpoint; constants of one's own can be
given instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import chex
import jax.numpy as jnp

from rlhf_jax.ops.masking import masked_moments
from rlhf_jax.types import Array, Mean

EPS = 1e-6  # under the batch's deviation: a component that is the same everywhere says nothing


@dataclasses.dataclass(frozen=True)
class Share:
    """How one component enters the score."""

    label: str  # logged as reward/<label>
    weight: float = 1.0
    clip: tuple[float, float] | None = None
    over_batch: bool = False  # normalise by the batch's mean and (unbiased) deviation
    moments: tuple[float, float] | None = None  # normalise by this mean and deviation


def combine(raw: Array, real: Array, shares: Sequence[Share], *, default: float | None, batch_moments: bool = True) -> tuple[Array, dict[str, Mean]]:
    """The score of each row, and each component's mean.

    Args:
      raw: [B, C] as the rewards gave them, not finite where one failed.
      real: [B] bool, false on filler rows.
      shares: C.
      default: stands in for a component that failed; None: the row gets no score.
      batch_moments: whether components are normalised over the batch; false in a validation, whose mean would be 0 by construction.

    Returns:
      scores: [B] float32, 0 on filler rows, NaN where there is none.
      metrics: reward/<label> of each component as it was given, over the rows that it scored; reward/failed, the share of rows with a failure.
    """
    chex.assert_rank([raw, real], [2, 1])
    chex.assert_shape(raw, (real.shape[0], len(shares)))
    failed = ~jnp.isfinite(raw)
    metrics = {"reward/failed": Mean.of(failed.any(-1), real)}
    scores = jnp.zeros(real.shape, jnp.float32)
    for column, share in enumerate(shares):
        known = real & ~failed[:, column]
        value = jnp.where(failed[:, column], 0.0, raw[:, column]).astype(jnp.float32)
        metrics[f"reward/{share.label}"] = Mean.of(value, known)
        if share.weight == 0:  # it is only logged, and its failure takes no row's score
            continue
        if default is not None:
            value = jnp.where(failed[:, column], default, value)
            known = real
        if share.clip is not None:
            value = jnp.clip(value, *share.clip)
        if share.moments is not None:
            value = (value - share.moments[0]) / share.moments[1]
        if share.over_batch and batch_moments:
            mean, variance = masked_moments(value, known)
            value = jnp.where(variance > EPS**2, (value - mean) / jnp.sqrt(jnp.maximum(variance, EPS**2)), 0.0)
        scores = scores + share.weight * jnp.where(known, value, jnp.nan)
    return jnp.where(real, scores, 0.0), metrics
