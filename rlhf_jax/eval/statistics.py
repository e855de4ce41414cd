"""How sure a comparison is: win rates on paired prompts and the intervals around them, in plain NumPy.

Prompts are the unit of resampling, since two responses to one prompt are not independent of each other. A win rate is the mean of
per-prompt win values, so its interval is the bootstrap of a mean.

See: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", ch. 13 (percentile interval); Koehn 2004 (paired bootstrap).
"""

from __future__ import annotations

import statistics

import numpy as np
from numpy.typing import ArrayLike

_CHUNK = 1 << 22  # resampled indices held at a time, 32 MiB


def win_values(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
    """Per prompt, the share of comparisons that ours wins; a tie counts ½.

    w_i = mean over (a, b) of 1[ours_ia > theirs_ib] + ½ · 1[ours_ia = theirs_ib]

    Args:
      ours: [N] or [N, S] gold of our S samples per prompt.
      theirs: [N] or [N, S'] gold of the opponent's samples on the same prompts; every sample of ours meets every one of theirs.

    Returns:
      [N] float64 in [0, 1].

    Raises:
      ValueError: different numbers of prompts, no prompt, or a value that is NaN.
    """
    left, right = _by_prompt(ours), _by_prompt(theirs)
    if left.shape[0] != right.shape[0] or left.size == 0 or right.size == 0:
        raise ValueError(f"win_values: ours {left.shape} and theirs {right.shape} must hold the same prompts, at least one")
    if np.isnan(left).any() or np.isnan(right).any():
        raise ValueError("win_values: a value is NaN; it can neither win nor lose")
    margin = left[:, :, None] - right[:, None, :]  # [N, S, S']
    return ((margin > 0) + 0.5 * (margin == 0)).mean((1, 2))


def win_rate(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Mean of `win_values` over the prompts, in [0, 1]; 0.5 is no difference."""
    return float(win_values(ours, theirs).mean())


def paired_bootstrap(values: ArrayLike, *, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of `values`, resampling prompts with replacement.

    Args:
      values: [N] one value per prompt, e.g. `win_values(ours, theirs)`: the pairing is already inside.
      resamples: number of bootstrap samples; 10_000 fixes the bounds to about the third digit.
      seed: of the resampling.
      level: coverage in (0, 1).

    Returns:
      (low, high).

    Raises:
      ValueError: no value, a non-finite one, resamples < 1, or a level outside (0, 1).
    """
    values = _finite(values)
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"paired_bootstrap: resamples={resamples} must be ≥ 1 and level={level} inside (0, 1)")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // values.size)
    means = [
        values[rng.integers(values.size, size=(min(rows, resamples - done), values.size))].mean(1) for done in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_ci(values: ArrayLike, *, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and its normal-theory interval, mean ± z · s / √N with the unbiased s.

    Args:
      values: [N] one value per prompt.
      level: coverage in (0, 1).

    Returns:
      (mean, low, high); a single value has the interval (−inf, inf), for nothing is known of its spread.

    Raises:
      ValueError: no value, a non-finite one, or a level outside (0, 1).
    """
    values = _finite(values)
    if not 0 < level < 1:
        raise ValueError(f"mean_ci: level={level} must lie inside (0, 1)")
    mean = float(values.mean())
    if values.size == 1:
        return mean, float("-inf"), float("inf")
    half = statistics.NormalDist().inv_cdf((1 + level) / 2) * float(values.std(ddof=1)) / values.size**0.5
    return mean, mean - half, mean + half


def _by_prompt(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim not in (1, 2):
        raise ValueError(f"win_values: values of shape {array.shape}; expected [N] or [N, S]")
    return array.reshape(array.shape[0], -1) if array.size else array.reshape(0, 1)


def _finite(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"expected a non-empty [N] array of finite values, got shape {array.shape}")
    return array
