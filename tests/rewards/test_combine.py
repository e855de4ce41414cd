"""Sums of rewards against a loop in NumPy, and what a failure of one component does to the row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rewards.combine import Share, combine

NAN = float("nan")
RAW = np.array([[1.0, 5.0, 3.0], [0.0, -9.0, 5.0], [1.0, 9.0, 10.0], [7.0, 7.0, 7.0]], np.float32)
REAL = np.array([True, True, True, False])
SHARES = (Share("a", 2.0), Share("b", 0.5, clip=(-4.0, 6.0), over_batch=True), Share("c", -1.0, moments=(3.0, 2.0)))


def loop(raw: np.ndarray, default: float | None) -> np.ndarray:
    """The equation, row by row."""
    out = np.zeros(len(raw))
    clipped = [np.clip(raw[i, 1] if np.isfinite(raw[i, 1]) else (default if default is not None else np.nan), -4, 6) for i in range(3)]
    known = [value for value in clipped if not np.isnan(value)]
    for i in range(3):
        a, c = (value if np.isfinite(value) else (np.nan if default is None else default) for value in (raw[i, 0], raw[i, 2]))
        out[i] = 2 * a + 0.5 * (clipped[i] - np.mean(known)) / np.std(known, ddof=1) - (c - 3) / 2
    return out


def run(raw: np.ndarray, shares=SHARES, default=None, **more):
    return jax.jit(lambda x, r: combine(x, r, shares, default=default, **more))(jnp.asarray(raw), jnp.asarray(REAL))


def test_the_sum() -> None:
    scores, metrics = run(RAW)
    np.testing.assert_allclose(scores, loop(RAW, None), rtol=1e-5)
    assert float(metrics["reward/a"].compute()) == pytest.approx(2 / 3) and float(metrics["reward/b"].compute()) == pytest.approx(5 / 3)
    assert float(metrics["reward/failed"].compute()) == 0.0


@pytest.mark.parametrize("gap", [NAN, np.inf, -np.inf])
def test_a_failed_component(gap: float) -> None:
    raw = RAW.copy()
    raw[1, 1] = gap
    scores, metrics = run(raw)
    assert np.isnan(scores[1]) and np.isfinite(np.delete(np.asarray(scores), 1)).all()
    np.testing.assert_allclose(np.asarray(scores)[[0, 2]], loop(raw, None)[[0, 2]], rtol=1e-5)
    assert float(metrics["reward/failed"].compute()) == pytest.approx(1 / 3)
    assert float(metrics["reward/b"].compute()) == pytest.approx(7.0)
    scores, metrics = run(raw, default=-1.0)
    np.testing.assert_allclose(scores, loop(raw, -1.0), rtol=1e-5)
    assert float(metrics["reward/failed"].compute()) == pytest.approx(1 / 3)


def test_a_component_of_weight_0_is_only_logged() -> None:
    raw, shares = RAW.copy(), (SHARES[0], Share("b", 0.0, over_batch=True))
    raw[1, 1] = NAN
    scores, metrics = run(raw[:, :2], shares)
    np.testing.assert_allclose(scores, [2.0, 0.0, 2.0, 0.0])
    assert float(metrics["reward/failed"].compute()) == pytest.approx(1 / 3) and float(metrics["reward/b"].compute()) == pytest.approx(7.0)


def test_filler_rows_count_for_nothing() -> None:
    raw = RAW.copy()
    raw[3] = NAN
    for given in (RAW, raw):
        scores, metrics = run(given)
        assert scores[3] == 0.0 and float(metrics["reward/failed"].compute()) == 0.0
        np.testing.assert_allclose(scores, run(RAW)[0], rtol=1e-6)


def test_normalised_over_the_batch() -> None:
    share = (Share("b", 1.0, over_batch=True),)
    scores, _ = run(RAW[:, 1:2], share)
    assert np.asarray(scores)[:3].mean() == pytest.approx(0, abs=1e-6) and np.asarray(scores)[:3].std(ddof=1) == pytest.approx(1, rel=1e-5)
    np.testing.assert_array_equal(run(np.full((4, 1), 3.0, np.float32), share)[0], np.zeros(4))
    np.testing.assert_allclose(run(RAW[:, 1:2], share, batch_moments=False)[0], [5.0, -9.0, 9.0, 0.0])


def test_shapes() -> None:
    with pytest.raises(AssertionError):
        combine(jnp.zeros((4, 2)), jnp.ones(4, bool), SHARES, default=None)
