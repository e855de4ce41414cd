"""Accuracies counted by hand; the length baseline learns its rule on one split and is measured on the other."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.eval import preference


def test_accuracy_is_strict_with_ties_half():
    assert preference.accuracy([2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 2.0, -1.0]) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert preference.accuracy(np.zeros(7), np.zeros(7)) == 0.5


def test_accuracy_by_source():
    found = preference.accuracy_by([1, 0, 1, 1], [0, 1, 0, 1], ["b", "a", "b", "a"])
    assert found == {"a": (0.25, 2), "b": (1.0, 2)} and list(found) == ["a", "b"]


def test_accuracy_by_length_bins_the_longer_response():
    found = preference.accuracy_by_length(
        [1, 0, 1, 1], [0, 1, 0, 1], chosen_lengths=[3, 8, 20, 1], rejected_lengths=[7, 2, 1, 16], edges=[8, 16]
    )
    assert found == {"< 8": (1.0, 1), "[8, 16)": (0.0, 1), "≥ 16": (0.75, 2)}
    assert preference.accuracy_by_length([1], [0], [3], [30], edges=[8, 16]) == {"≥ 16": (1.0, 1)}


def test_bins_average_to_the_whole():
    rng = np.random.default_rng(0)
    chosen, rejected, long, short = rng.integers(0, 5, (4, 300))
    bins = preference.accuracy_by_length(chosen, rejected, long, short, edges=[1, 2, 4])
    assert sum(n for _, n in bins.values()) == 300
    assert sum(value * n for value, n in bins.values()) / 300 == pytest.approx(preference.accuracy(chosen, rejected))


@pytest.mark.parametrize("sign", [1, -1])
def test_length_baseline_chooses_on_train_and_applies_to_test(sign):
    train = sign * np.array([5, 6, 7]), sign * np.array([1, 9, 2])  # the longer (shorter) one wins 2 of 3
    test = sign * np.array([1, 5, 4, 3]), sign * np.array([2, 6, 4, 1])  # but 1 of 4, with one tie
    baseline = preference.length_baseline(*(x + 20 for x in train), *(x + 20 for x in test))
    assert baseline.rule == ("longer wins" if sign == 1 else "shorter wins")
    assert baseline.train_accuracy == pytest.approx(2 / 3) and baseline.accuracy == pytest.approx(1.5 / 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: preference.accuracy([], []),
        lambda: preference.accuracy([1.0], [1.0, 2.0]),
        lambda: preference.accuracy([float("nan")], [1.0]),
        lambda: preference.accuracy_by([1.0], [0.0], ["a", "b"]),
        lambda: preference.accuracy_by_length([1.0], [0.0], [1, 2], [1, 2], edges=[3]),
        lambda: preference.accuracy_by_length([1.0], [0.0], [1], [2], edges=[3, 3]),
    ],
)
def test_refuses(call):
    with pytest.raises(ValueError, match="accuracy"):
        call()
