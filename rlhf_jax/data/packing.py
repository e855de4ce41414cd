"""Orders and packing plans: pure functions of (lengths, seed, epoch).

An epoch's order is the stable argsort of raw Philox words keyed by (seed, epoch): counter-based, and free of NumPy's right to change its
distributions. A plan packs whole rows, never cut: first-fit decreasing inside windows of the shuffled order, so that which rows
share a pack changes with the epoch, then the packs in a shuffled order of their own.
See: Krell et al. 2021 (arXiv:2107.02027). Deviation: exact first-fit inside windows of 1024 rows, instead of histograms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 1024  # rows; first-fit decreasing wastes little from a few hundred on
Plan = Sequence[np.ndarray] | np.ndarray  # packs of row numbers
_WORD = 2**64 - 1


def epoch_order(count: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """A permutation of range(count), [count] int64.

    Args:
      count: rows.
      seed, epoch: the key.
      stream: which of several orders of one epoch.
    """
    bits = np.random.Philox(key=np.array([seed & _WORD, (epoch << 8 | stream) & _WORD], np.uint64))
    return np.argsort(bits.random_raw(count), kind="stable") if count else np.zeros(0, np.int64)


def pack(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Packs of rows whose lengths sum to at most `capacity`, each row in exactly one.

    Args:
      order: [n] row numbers.
      lengths: [N] tokens of every row, 1 ≤ length ≤ capacity.
      capacity: tokens of a pack.

    Raises:
      ValueError: a row is longer than a pack.
    """
    if len(order) and lengths[order].max() > capacity:
        raise ValueError(f"a row of {lengths[order].max()} tokens does not fit a pack of {capacity}")
    packs: list[np.ndarray] = []
    for begin in range(0, len(order), WINDOW):
        rows = order[begin : begin + WINDOW]
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        space, bins = np.full(len(rows), capacity), [[] for _ in rows]  # type: ignore[var-annotated]
        for row in rows:
            first = int(np.argmax(space >= lengths[row]))
            space[first] -= lengths[row]
            bins[first].append(row)
        packs += [np.array(bin_) for bin_ in bins if bin_]
    return packs


def epoch_plan(lengths: np.ndarray, capacity: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The packs of one epoch in the order in which training meets them.

    Args:
      lengths: [N] tokens of every row.
      capacity: tokens of a pack.
      seed, epoch: the key.
    """
    packs = pack(epoch_order(len(lengths), seed, epoch), lengths, capacity)
    return [packs[i] for i in epoch_order(len(packs), seed, epoch, stream=1)]
