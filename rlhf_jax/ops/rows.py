"""Rows of a batch: split into strided parts, joined, shuffled; whole groups where a rollout's neighbours share a prompt (`Sequences.prefix`)."""

from __future__ import annotations

import chex
import jax

from rlhf_jax.types import Array, PyTree, Sequences


def count(batch: PyTree) -> int:
    """B, the leading axis of every leaf."""
    return jax.tree.leaves(batch)[0].shape[0]


def group_size(batch: PyTree) -> int:
    """G, the rows that stay together: the most neighbours that share a prompt in any `Sequences` of the batch; 1 where none do."""
    return max((seqs.prefix[0] for seqs in _sequences(batch) if seqs.prefix is not None), default=1)


def apart(batch: PyTree) -> PyTree:
    """The batch with every row on its own: nothing is computed once for a group."""
    alone = lambda x: x.replace(prefix=(1, x.prefix[1])) if isinstance(x, Sequences) and x.prefix is not None else x  # noqa: E731
    return jax.tree.map(alone, batch, is_leaf=lambda x: isinstance(x, Sequences))


def divisible(batch: PyTree, parts: int) -> PyTree:
    """The batch as `interleave` splits it into so many parts: with its groups where they divide, else with every row on its own.

    Args:
      batch: leaves leading with B.
      parts: how many.
    """
    return batch if count(batch) // group_size(batch) % parts == 0 else apart(batch)


def interleave(batch: PyTree, parts: int) -> PyTree:
    """[B, …] → [parts, B/parts, …], part i holding groups i, i + parts, …: a contiguous split of a sharded batch would be replicated.

    Args:
      batch: leaves leading with B; `parts` divides its groups.
      parts: how many.
    """
    size, unit = count(batch), group_size(batch)
    if size % (unit * parts):
        raise ValueError(f"{size} rows in groups of {unit} do not split into {parts} parts")
    return jax.tree.map(lambda x: _groups(x, unit, parts).swapaxes(0, 1).reshape(parts, size // parts, *x.shape[1:]), batch)


def joined(parts: PyTree, unit: int) -> PyTree:
    """The inverse of `interleave`.

    Args:
      parts: leaves [parts, B/parts, …].
      unit: the group size that they were split by.
    """
    back = lambda x: x.reshape(x.shape[0], -1, unit, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
    return jax.tree.map(back, parts)


def shuffled(batch: PyTree, key: Array) -> PyTree:
    """The batch's groups in a random order.

    Args:
      batch: leaves leading with B.
      key: [] typed key.
    """
    chex.assert_rank(key, 0)
    unit = group_size(batch)
    order = jax.random.permutation(key, count(batch) // unit)
    return jax.tree.map(lambda x: x.reshape(-1, unit, *x.shape[1:])[order].reshape(x.shape), batch)


def _groups(x: Array, unit: int, parts: int) -> Array:
    return x.reshape(-1, parts, unit, *x.shape[1:])


def _sequences(batch: PyTree) -> list[Sequences]:
    return [x for x in jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, Sequences)) if isinstance(x, Sequences)]
