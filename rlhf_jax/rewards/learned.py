"""The learned reward: a reward model's score of exactly the tokens that were rolled out.

Flow: the reward network reads the rollout's own token rows (no decoding, no second tokenization) and the score is taken at the last real
token, which is the stop token when the response ended: the same reading position as in the reward model's training. Scores may be
normalised by the mean and standard deviation over a reference set, which are stored as `reward_mean` and `reward_std` in the reward
model's checkpoint, so that a reward scale (and with it a KL coefficient) carries over between reward models.

See: Huang et al. 2024, "The N+ implementation details of RLHF with PPO" (arXiv:2403.17031). Deviation: they shift the head's bias until the
demonstrations score 0 on average; here both moments are normalised, and kept beside the parameters instead of inside them.
"""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from rlhf_jax.errors import UserError
from rlhf_jax.ops.masking import at_last_real
from rlhf_jax.types import Array, Rollout, Sequences


def score(nets: Any, rollout: Rollout) -> Array:
    """Reward-model score of each completion, read at its last real token.

    Args:
      nets: networks whose `reward(seqs)` returns `.scores` [B, T].
      rollout: `seqs` [B, T]; padding may stand on both sides.

    Returns:
      [B] float32, zero on filler rows.
    """
    chex.assert_rank(rollout.seqs.tokens, 2)
    return score_sequences(nets, rollout.seqs)


def score_sequences(nets: Any, seqs: Sequences) -> Array:
    """Reward-model score of each row, read at its last real token.

    Args:
      nets: networks whose `reward(seqs)` returns `.scores` [B, T].
      seqs: [B, T].

    Returns:
      [B] float32, zero on filler rows.
    """
    chex.assert_rank(seqs.tokens, 2)
    scores = nets.reward(seqs).scores
    chex.assert_equal_shape([scores, seqs.tokens])
    at_end = at_last_real(scores, seqs.segment_ids).astype(jnp.float32)
    return jnp.where(seqs.real, at_end, 0.0)


def normalise(scores: Array, mean: float | Array, std: float | Array) -> Array:
    """(scores − mean) / std.

    Args:
      scores: [B] float.
      mean: scalar, the reference set's mean.
      std: scalar > 0, the reference set's standard deviation.

    Returns:
      [B] float32.
    """
    chex.assert_rank([scores, mean, std], [1, 0, 0])
    return (scores.astype(jnp.float32) - mean) / std


def reference_moments(scores: ArrayLike) -> tuple[float, float]:
    """Mean and (population) standard deviation of a reward model's scores over a reference set: what its checkpoint stores.

    Args:
      scores: [N] float, one score per reference response, without filler rows.

    Returns:
      (reward_mean, reward_std), reward_std > 0.

    Raises:
      UserError: fewer than two scores, a non-finite one, or scores that are all the same.
    """
    values = np.asarray(scores, np.float64).ravel()
    if values.size < 2:
        raise UserError(f"reward normalisation: the reference set has {values.size} scores, and 2 or more are needed; enlarge it")
    if not np.isfinite(values).all():
        where = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UserError(f"reward normalisation: score {where} of the reference set is {values[where]}; the reward model diverged")
    mean, std = float(values.mean()), float(values.std())
    # Rounding alone spreads equal float32 scores by about 1e-7 of their size; dividing by that would be noise.
    if std <= 1e-6 * max(1.0, abs(mean)):
        raise UserError(f"reward normalisation: every score of the reference set is {mean:.6g}; train the reward model first")
    return mean, std
