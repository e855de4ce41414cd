"""Dynamic sampling: groups whose scores are all the same are dropped, and groups of further prompts take their place.

A round samples a whole batch of prompts, so that nothing is compiled twice; groups that say something fill the batch in their order, and what is
left over when it is full is dropped too. Where the rounds are used up before, the rest of the batch is filler, which trains nothing.

See: Yu et al. 2025, DAPO, section 3.2 (arXiv:2503.14476). Deviation: there, sampling goes on until the batch is full.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.ops.advantages import group_statistics
from rlhf_jax.types import Array, Mean, PyTree, Rollout


class Filled(NamedTuple):
    """A batch under way."""

    batch: Rollout  # [B, T], groups that are kept first, filler after them
    groups: Array  # [] int32, how many are kept
    sampled: Array  # [] float32, real groups that were sampled for it
    dropped: Array  # [] float32, of these, for equal scores
    surplus: Array  # [] float32, of these, since the batch was full
    rounds: Array  # [] float32
    score: Mean  # over all that was sampled


def as_filler(batch: PyTree, rows: Array) -> Any:
    """The rollout with some rows made filler: padding only, without a score.

    Args:
      batch: a Rollout of B rows.
      rows: [B] bool.
    """
    chex.assert_shape(rows, batch.truncated.shape)
    seqs = batch.seqs.replace(segment_ids=jnp.where(rows[:, None], 0, batch.seqs.segment_ids), loss_mask=batch.seqs.loss_mask & ~rows[:, None])
    scores = None if batch.scores is None else jnp.where(rows, 0.0, batch.scores)
    return batch.replace(seqs=seqs, scores=scores, truncated=batch.truncated & ~rows, prompt_ids=jnp.where(rows, -1, batch.prompt_ids),
                         sample_ids=jnp.where(rows, 0, batch.sample_ids))


def rows_of(groups: Array, size: int) -> Array:
    """The rows of groups that lie side by side, [N · size] int32.

    Args:
      groups: [N] int32.
      size: rows of a group.
    """
    chex.assert_rank(groups, 1)
    return (groups[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None, :]).reshape(-1)


def gathered(parts: PyTree, groups: Array, size: int) -> Any:
    """Whole groups of a rollout in a new order, numbered anew.

    Args:
      parts: a Rollout of B rows, each `size` neighbours a group.
      groups: [N] int32, which of the B / size groups.
      size: rows of a group.
    """
    chex.assert_rank(groups, 1)
    rows = rows_of(groups, size)
    batch = jax.tree.map(lambda x: x[rows], parts)
    return batch.replace(group_ids=jnp.repeat(jnp.arange(groups.shape[0], dtype=jnp.int32), size))


def fill(before: Filled | None, fresh: Rollout, *, size: int) -> Filled:
    """One more round.

    Args:
      before: the batch so far; None: this is the first round.
      fresh: scored, [B, T]; a score that is unknown (NaN) counts for nothing.
      size: rows of a group, G; each G neighbours are one.

    Returns:
      The batch with the groups of `fresh` that it had room for.
    """
    chex.assert_rank([fresh.seqs.tokens, fresh.truncated], [2, 1])
    assert fresh.scores is not None
    known = fresh.real & ~jnp.isnan(fresh.scores)
    ids = jnp.arange(fresh.truncated.shape[0], dtype=jnp.int32) // size  # by place: two groups may have one prompt
    wanted = fresh.truncated.shape[0] // size
    told = ~group_statistics(jnp.where(known, fresh.scores, 0.0), ids, known).constant[:wanted]
    real = fresh.real.reshape(-1, size).any(-1)
    rolled, keep = fresh, told
    if before is not None:
        rolled = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), before.batch, fresh)
        keep = jnp.concatenate([jnp.arange(wanted) < before.groups, told])
    order = jnp.argsort(~keep, stable=True)[:wanted]
    groups = jnp.minimum(keep.sum(), wanted).astype(jnp.int32)
    batch = as_filler(gathered(rolled, order, size), jnp.repeat(jnp.arange(wanted) >= groups, size))
    score, one = Mean.of(fresh.scores, known), jnp.float32(1.0)
    found = (real.sum(), (real & ~told).sum(), keep.sum() - groups)
    sampled, dropped, surplus = (x.astype(jnp.float32) for x in found)
    if before is None:
        return Filled(batch, groups, sampled, dropped, surplus, one, score)
    return Filled(batch, groups, before.sampled + sampled, before.dropped + dropped, before.surplus + surplus, before.rounds + one,
                  before.score.merge(score))


def metrics(filled: Filled) -> dict[str, Mean]:
    """What the refilling took, and the score of all that was sampled (objective/score is that of the batch).

    Args:
      filled: after its last round.
    """
    chex.assert_rank(filled.rounds, 0)
    return {
        "rollout/rounds": Mean.of(filled.rounds), "rollout/dropped_groups": Mean(filled.dropped, filled.sampled),
        "rollout/surplus_groups": Mean(filled.surplus, filled.sampled),
        "rollout/filler_rows": Mean.of(~filled.batch.real), "rollout/sampled_score": filled.score,
    }
