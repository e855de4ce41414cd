"""Win rates by hand; bootstrap intervals against exact enumeration and against scipy where it is installed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rlhf_jax.eval import statistics


def test_win_values_with_ties():
    np.testing.assert_array_equal(statistics.win_values([1.0, 0.5, 0.0], [0.5, 0.5, 0.5]), [1.0, 0.5, 0.0])
    assert statistics.win_rate([1.0, 0.5, 0.9], [0.5, 0.5, 0.5]) == pytest.approx(2.5 / 3)


def test_win_rates_of_two_sides_add_up_to_one():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    assert statistics.win_rate(ours, theirs) + statistics.win_rate(theirs, ours) == pytest.approx(1.0)


def test_every_sample_meets_every_sample():
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(0, 3, (5, 4)), rng.integers(0, 3, (5, 2))
    expected = [
        sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(ours[i], theirs[i])) / 8 for i in range(5)
    ]
    np.testing.assert_allclose(statistics.win_values(ours, theirs), expected)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [1.0, 2.0]), ([], []), ([float("nan")], [1.0]), ([[[1.0]]], [1.0])])
def test_win_values_refuses(ours, theirs):
    with pytest.raises(ValueError, match="win_values"):
        statistics.win_values(ours, theirs)


def test_bootstrap_against_exact_enumeration():
    """Of three values all 27 resamples can be listed, so that the bootstrap's distribution is known."""
    values = np.array([0.0, 0.5, 1.0])
    means = np.array([np.mean(draw) for draw in itertools.product(values, repeat=3)])
    for level in (0.5, 0.8):
        low, high = statistics.paired_bootstrap(values, resamples=40_000, seed=0, level=level)
        # Means lie on a grid of 1/6; neither quantile is at a jump of the distribution, so sampling finds the exact grid value.
        assert low == pytest.approx(np.quantile(means, (1 - level) / 2, method="inverted_cdf"))
        assert high == pytest.approx(np.quantile(means, (1 + level) / 2, method="inverted_cdf"))


def test_bootstrap_approaches_the_normal_interval():
    values = np.random.default_rng(2).normal(0.6, 0.2, 2000)
    low, high = statistics.paired_bootstrap(values, resamples=20_000, seed=3)
    half = 1.959964 * values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_bootstrap_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(4).choice([0.0, 0.5, 1.0], 300, p=[0.2, 0.2, 0.6])
    ours = statistics.paired_bootstrap(values, resamples=20_000, seed=5)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=6).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.004)


def test_bootstrap_repeats_with_its_seed_and_in_any_chunking(monkeypatch):
    values = np.random.default_rng(7).random(50)
    first = statistics.paired_bootstrap(values, resamples=1001, seed=1)
    assert first == statistics.paired_bootstrap(values, resamples=1001, seed=1)
    assert first != statistics.paired_bootstrap(values, resamples=1001, seed=2)
    monkeypatch.setattr(statistics, "_CHUNK", 50 * 7)
    assert first == statistics.paired_bootstrap(values, resamples=1001, seed=1)


def test_bootstrap_of_a_constant_has_no_width():
    assert statistics.paired_bootstrap([1.0] * 9, resamples=100, seed=0) == (1.0, 1.0)


@pytest.mark.parametrize(
    "kwargs", [{"resamples": 0}, {"level": 0.0}, {"level": 1.0}, {"values": []}, {"values": [float("nan")]}, {"values": [[1.0]]}]
)
def test_bootstrap_refuses(kwargs):
    arguments = {"values": [0.1, 0.2], "resamples": 10, "level": 0.9, **kwargs}
    with pytest.raises(ValueError):
        statistics.paired_bootstrap(arguments.pop("values"), seed=0, **arguments)


def test_mean_ci_by_hand():
    mean, low, high = statistics.mean_ci([1.0, 2.0, 3.0, 4.0])
    half = 1.959963985 * (5 / 3) ** 0.5 / 2  # unbiased variance 5/3, N = 4
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert statistics.mean_ci([1.0, 2.0, 3.0, 4.0], level=0.5)[2] == pytest.approx(2.5 + half * 0.6744897502 / 1.959963985)
    assert statistics.mean_ci([0.3])[1:] == (float("-inf"), float("inf"))
