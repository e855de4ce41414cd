"""How often a reward model agrees with a preference, where it does, and how much of that its answer lengths alone would explain.

Flow: per-pair scores come in as arrays, accuracies go out as floats: over all pairs, per source and per length bin. Beside them stands the
length-only baseline: the better of "longer wins" and "shorter wins", chosen on the training pairs and applied to the test pairs,
so that it has no more knowledge of the test pairs than the reward model has.

See: Singhal et al. 2023, "A Long Way to Go: Investigating Length Correlations in RLHF" (arXiv:2310.03716). Deviation: the direction is
chosen on the training split, not assumed to be "longer".
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class LengthBaseline:
    """A rule that looks at nothing but length, and how often it is right."""

    rule: str  # "longer wins" or "shorter wins"
    accuracy: float  # on the test pairs, ties ½
    train_accuracy: float  # on the training pairs, ≥ ½ by choice of the rule


def accuracy(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """Share of pairs with chosen > rejected, strictly; a tie counts ½.

    Args:
      chosen: [N] scores of the preferred responses.
      rejected: [N] scores of the others.

    Returns:
      in [0, 1]. A constant reward model has 0.5.

    Raises:
      ValueError: no pair, different shapes, or a NaN score.
    """
    return float(_correct(chosen, rejected).mean())


def accuracy_by(chosen: ArrayLike, rejected: ArrayLike, groups: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Accuracy and number of pairs per group (e.g. the pairs' source), groups in alphabetical order.

    Args:
      chosen: [N] scores.
      rejected: [N] scores.
      groups: N names.

    Raises:
      ValueError: as `accuracy`, or not one group per pair.
    """
    correct = _correct(chosen, rejected)
    if len(groups) != correct.size:
        raise ValueError(f"accuracy_by: {len(groups)} groups for {correct.size} pairs")
    names = np.asarray(groups, dtype=object)
    return {name: (float(correct[names == name].mean()), int((names == name).sum())) for name in sorted(set(groups))}


def accuracy_by_length(
    chosen: ArrayLike, rejected: ArrayLike, chosen_lengths: ArrayLike, rejected_lengths: ArrayLike, *, edges: Sequence[float]
) -> dict[str, tuple[float, int]]:
    """Accuracy and number of pairs per bin of the longer response's length; empty bins are left out.

    Args:
      chosen: [N] scores.
      rejected: [N] scores.
      chosen_lengths: [N] tokens.
      rejected_lengths: [N] tokens.
      edges: ascending bin borders, tokens; bin k holds edges[k] ≤ length < edges[k+1], with an open bin at either end.

    Returns:
      {"[8, 16)": (accuracy, pairs), …} in order of length.

    Raises:
      ValueError: as `accuracy`, or edges that do not ascend.
    """
    correct = _correct(chosen, rejected)
    longer = np.maximum(np.asarray(chosen_lengths), np.asarray(rejected_lengths))
    if longer.shape != correct.shape:
        raise ValueError(f"accuracy_by_length: lengths {longer.shape} for {correct.size} pairs")
    if any(b <= a for a, b in itertools.pairwise(edges)):
        raise ValueError(f"accuracy_by_length: edges {list(edges)} must ascend")
    borders = [-np.inf, *edges, np.inf]
    bins = {}
    for low, high in itertools.pairwise(borders):
        inside = (low <= longer) & (longer < high)
        if inside.any():
            name = f"< {high:g}" if low == -np.inf else f"≥ {low:g}" if high == np.inf else f"[{low:g}, {high:g})"
            bins[name if len(borders) > 2 else "all"] = (float(correct[inside].mean()), int(inside.sum()))
    return bins


def length_baseline(train_chosen: ArrayLike, train_rejected: ArrayLike, test_chosen: ArrayLike, test_rejected: ArrayLike) -> LengthBaseline:
    """The better length rule of the training pairs, measured on the test pairs.

    Args:
      train_chosen: [M] lengths of the preferred training responses, tokens or characters.
      train_rejected: [M] lengths of the others.
      test_chosen: [N] lengths in the same unit.
      test_rejected: [N].

    Raises:
      ValueError: as `accuracy`, for either split.
    """
    longer = accuracy(train_chosen, train_rejected)
    if longer >= 0.5:
        return LengthBaseline("longer wins", accuracy(test_chosen, test_rejected), longer)
    return LengthBaseline("shorter wins", accuracy(test_rejected, test_chosen), 1.0 - longer)


def _correct(chosen: ArrayLike, rejected: ArrayLike) -> np.ndarray:
    """[N] 1 where chosen wins, ½ on a tie, else 0."""
    left, right = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    if left.shape != right.shape or left.ndim != 1 or left.size == 0:
        raise ValueError(f"accuracy: chosen {left.shape} and rejected {right.shape} must be non-empty and of one shape [N]")
    if np.isnan(left).any() or np.isnan(right).any():
        raise ValueError("accuracy: a score is NaN; a NaN can neither win nor lose")
    return (left > right) + 0.5 * (left == right)
