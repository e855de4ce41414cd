"""Means that are not means: a quantile and a maximum that merge by addition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.types import Mean, Tail, settled


@pytest.mark.parametrize(("q", "exact"), [(0.99, 99.0), (0.5, 50.0), (1.0, 100.0)])
def test_quantiles_of_one_to_a_hundred(q, exact):
    """Entry number q · n of n in their order, at most 7.3 % too high; the scale changes nothing."""
    for scale in (1e-3, 0.1, 0.5):
        values = jnp.asarray(np.random.default_rng(0).permutation(np.arange(1, 101)) * scale, jnp.float32)
        found = float(Tail.at(q, values, jnp.ones(100, bool)).compute())
        assert exact * scale <= found * (1 + 1e-6) and found <= 1.073 * exact * scale
        assert float(Tail.at(q, values, jnp.ones(100, bool), exponential=True).compute()) == pytest.approx(np.exp(found), rel=1e-5)


def test_ends_by_hand():
    every = jnp.ones(3, bool)
    assert float(Tail.at(1.0, jnp.zeros(3), every).compute()) == 0.0
    assert float(Tail.at(1.0, jnp.array([-5.0, -1.0, 0.0]), every, exponential=True).compute()) == 1.0
    assert float(Tail.at(1.0, jnp.array([1e-9, 0.0, 0.0]), every).compute()) == pytest.approx(1e-6)
    assert float(Tail.at(1.0, jnp.array([1e9, jnp.inf, jnp.nan]), every).compute()) == 60.0
    assert float(Tail.at(1.0, jnp.array([7.0, jnp.nan, 1.0]), jnp.array([False, False, True])).compute()) == pytest.approx(1.0, rel=0.073)
    assert float(Tail.at(0.99, jnp.ones(3), jnp.zeros(3, bool)).compute()) == 0.0


def test_parts_merge_to_the_whole_by_addition():
    rng = np.random.default_rng(1)
    values, mask = jnp.asarray(rng.normal(size=(6, 50)) ** 3, jnp.float32), jnp.asarray(rng.random((6, 50)) < 0.7)
    whole = Tail.at(0.99, values, mask)
    parts = [Tail.at(0.99, values[i::3], mask[i::3]) for i in range(3)]
    np.testing.assert_array_equal(jax.tree.map(lambda *x: sum(x), *parts).above, whole.above)
    np.testing.assert_array_equal(parts[0].merge(parts[1]).merge(parts[2]).above, whole.above)
    assert float(whole.compute()) == float(parts[0].merge(parts[1]).merge(parts[2]).compute())
    with pytest.raises(AssertionError, match="tail"):
        whole.merge(Mean.of(values))


def test_settled_metrics_are_plain_means():
    found = settled({"a": Tail.at(1.0, jnp.array([0.5]), jnp.array([True])), "b": Mean.of(jnp.array([1.0, 3.0]))})
    assert type(found["a"]) is Mean and float(found["a"].compute()) == pytest.approx(0.5, rel=0.073) and float(found["b"].count) == 2.0
