"""Replay: a share of every batch are groups of earlier iterations, drawn at random from the newest that are kept.

They keep the log-probs, scores and version that they were sampled with; reference and old log-probs are computed anew like everybody's, and the
objective's correction old/sampler weighs them. What is kept is state, a ring of groups; what is drawn from it is a function of (run key, iteration).
Until there is something to draw, those rows are filler.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.train.refill import as_filler, gathered, rows_of
from rlhf_jax.types import Array, Mean, Purpose, PyTree, Rollout


class Memory(struct.PyTreeNode, kw_only=True):
    """Groups of earlier iterations."""

    rows: Rollout  # [C, T], C = capacity; what was never written is filler
    seen: Array  # [] int32, groups written so far, those that were overwritten included


def empty(rolled: PyTree, capacity: int) -> Memory:
    """Nothing remembered.

    Args:
      rolled: a scored rollout, or its shapes.
      capacity: C, rows.
    """
    chex.assert_equal_shape_prefix(jax.tree.leaves(rolled), 1)
    return Memory(rows=jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), rolled), seen=jnp.int32(0))


def mixed(memory: Memory, fresh: Rollout, key: Array, iteration: Array, *, replayed: int, size: int) -> tuple[Rollout, Memory, dict[str, Mean]]:
    """The batch of an iteration, and what is remembered after it.

    Args:
      memory: before this iteration: nothing of `fresh` is drawn.
      fresh: scored, [F, T].
      key: of the run.
      iteration: [] int32.
      replayed: R, rows to draw, whole groups of them, none twice.
      size: rows of a group.

    Returns:
      [F + R, T], fresh rows first; the memory with the real groups of `fresh` written over its oldest; metrics.
    """
    chex.assert_rank([fresh.seqs.tokens, iteration], [2, 0])
    slots, wanted, new = memory.rows.truncated.shape[0] // size, replayed // size, fresh.truncated.shape[0] // size
    there = jnp.minimum(memory.seen, slots)
    draw = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, Purpose.REPLAY), iteration), (slots,))
    chosen = jnp.argsort(jnp.where(jnp.arange(slots) < there, draw, jnp.inf))[:wanted]
    old = as_filler(gathered(memory.rows, chosen, size), jnp.repeat(jnp.arange(wanted) >= there, size))
    old = old.replace(group_ids=old.group_ids + new)
    batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), fresh, old)
    return batch, _remembered(memory, fresh, size), {"rollout/replayed": Mean.of(old.real.sum() / batch.truncated.shape[0])}


def _remembered(memory: Memory, fresh: Any, size: int) -> Memory:
    """Real groups go to the slots after the last one written; the newest win where there are more than slots."""
    slots = memory.rows.truncated.shape[0] // size
    real = fresh.real.reshape(-1, size).any(-1)
    number = memory.seen + jnp.cumsum(real) - 1  # of each real group, counted from the run's first
    total = memory.seen + real.sum().astype(jnp.int32)
    kept = real & (number >= total - slots)
    to = rows_of(jnp.where(kept, number % slots, slots), size)  # a slot beyond the end is not written
    written = jax.tree.map(lambda all, x: all.at[to].set(x, mode="drop"), memory.rows, fresh)
    return Memory(rows=written, seen=total)
