"""Running moments: the same as those of all values at once, whatever the batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.running import RunningMoments, update


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5,), (3, 1, 6), (2, 0, 4)])
def test_batches_merge_to_the_moments_of_all_values(sizes):
    rng = np.random.default_rng(0)
    moments, seen = RunningMoments.empty(), []
    for size in sizes:
        values = rng.normal(3.0, 2.0, 8)
        mask = np.arange(8) < size
        moments = update(moments, jnp.asarray(np.where(mask, values, np.nan), jnp.float32), jnp.asarray(mask))
        seen += values[mask].tolist()
    np.testing.assert_allclose([moments.mean, moments.var, moments.count], [np.mean(seen), np.var(seen), len(seen)], rtol=1e-5)
    np.testing.assert_allclose(moments.std, np.std(seen, ddof=1), rtol=1e-5)


def test_no_values_change_nothing_and_one_value_is_the_mean():
    empty = RunningMoments.empty()
    nothing = update(empty, jnp.ones(3), jnp.zeros(3, bool))
    assert (float(nothing.mean), float(nothing.var), float(nothing.std)) == (0.0, 1.0, 1.0)
    one = update(empty, jnp.full(1, 7.0), jnp.ones(1, bool))
    assert (float(one.mean), float(one.std)) == (7.0, 1.0)  # no deviation is known yet


def test_nothing_is_differentiated():
    slope = jax.grad(lambda x: update(RunningMoments.empty(), x, jnp.ones(3, bool)).mean)(jnp.ones(3))
    np.testing.assert_array_equal(slope, 0.0)


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        update(RunningMoments.empty(), jnp.ones((3, 2)), jnp.ones(3, bool))
