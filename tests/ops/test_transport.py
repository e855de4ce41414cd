"""Sorting as a transport plan: it is a permutation, no other one is cheaper, and filler is matched with filler."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.transport import optimal_plan


def test_no_other_permutation_costs_less():
    rng = np.random.default_rng(0)
    values, others = rng.normal(size=6).astype(np.float32), rng.normal(size=6).astype(np.float32)
    real = np.array([True, True, False, True, True, True])
    spoilt = [jnp.asarray(np.where(real, x, np.nan)) for x in (values, others)]
    plan = np.asarray(optimal_plan(*spoilt, jnp.asarray(real)))
    assert sorted(plan) == list(range(6)) and plan[2] == 2
    rows = np.flatnonzero(real)
    costs = [np.square(values[rows] - others[list(order)]).sum() for order in itertools.permutations(rows)]
    np.testing.assert_allclose(np.square(values[rows] - others[plan[rows]]).sum(), min(costs), rtol=1e-6)


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        optimal_plan(jnp.ones(3), jnp.ones(2), jnp.ones(3, bool))
