"""Clipped losses against loops and finite differences, at extremes and at the first step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import policy_gradient as pg
from tests.reference import maths
from tests.reference.numeric import gradient

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7)])
@pytest.mark.parametrize("jitted", [False, True])
def test_surrogate_value_and_gradient(shape, jitted):
    rng = np.random.default_rng(len(shape))
    x, advantages = rng.normal(size=shape) * 0.5, rng.normal(size=shape)

    def slow(x):
        return sum(maths.surrogate(x[i], advantages[i], 0.2, 0.3) for i in np.ndindex(*shape))

    f = lambda x: pg.clipped_surrogate(x, jnp.asarray(advantages, jnp.float32), **CLIP)  # noqa: E731
    f = jax.jit(f) if jitted else f
    fast = f(jnp.asarray(x, jnp.float32))
    assert fast.shape == shape
    np.testing.assert_allclose(fast.sum(), slow(x), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: f(x).sum())(jnp.asarray(x, jnp.float32)), gradient(slow, x), rtol=1e-3, atol=1e-4)


def test_at_the_first_step_the_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    advantages = jnp.array([1.5, -2.0, 0.0])
    f = lambda x: pg.clipped_surrogate(x, advantages, **CLIP)  # noqa: E731
    np.testing.assert_array_equal(f(jnp.zeros(3)), -advantages)
    np.testing.assert_allclose(jax.grad(lambda x: f(x).sum())(jnp.zeros(3)), -advantages)
    assert not any(side.any() for side in pg.clipped_sides(jnp.zeros(3), advantages, **CLIP))


def test_four_corners_by_hand():
    x, advantages = jnp.log(jnp.array([2.0, 2.0, 0.5, 0.5])), jnp.array([1.0, -1.0, 1.0, -1.0])
    np.testing.assert_allclose(pg.clipped_surrogate(x, advantages, **CLIP), [-1.3, 2.0, -0.5, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(pg.clipped_sides(x, advantages, **CLIP), [[False, False, False, True], [True, False, False, False]])


def test_dual_clipping_bounds_what_a_negative_advantage_can_cost():
    x, advantages = jnp.log(jnp.array([9.0, 9.0, 2.0, 0.5])), jnp.array([-2.0, 2.0, -2.0, -2.0])
    f = lambda x: pg.clipped_surrogate(x, advantages, **CLIP, dual_clip=3.0)  # noqa: E731
    np.testing.assert_allclose(f(x), [6.0, -2.6, 4.0, 1.6], rtol=1e-6)  # dual_clip · |A|; PPO's; PPO's; PPO's
    np.testing.assert_allclose(jax.grad(lambda x: f(x).sum())(x), [0.0, 0.0, 4.0, 0.0], rtol=1e-6)
    expected = [[False, False, False, True], [True, True, False, False]]
    np.testing.assert_array_equal(pg.clipped_sides(x, advantages, **CLIP, dual_clip=3.0), expected)
    unclipped = pg.clipped_surrogate(x, advantages, clip_low=1.0, clip_high=np.inf, dual_clip=3.0)
    np.testing.assert_allclose(unclipped, [6.0, -18.0, 4.0, 1.0], rtol=1e-6)  # a positive advantage is not touched
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=50), rng.normal(size=50)
    slow = [maths.dual_clipped(x[i], a[i], 0.2, 0.3, 1.5) for i in range(50)]
    np.testing.assert_allclose(pg.clipped_surrogate(jnp.asarray(x, jnp.float32), jnp.asarray(a, jnp.float32), **CLIP, dual_clip=1.5), slow, rtol=1e-5)


@pytest.mark.parametrize("log_ratio", [-1000.0, -50.0, 50.0, 1000.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_ratios_stay_finite(log_ratio, advantage):
    f = lambda x: pg.clipped_surrogate(x, jnp.array([advantage]), **CLIP).sum()  # noqa: E731
    value, slope = jax.value_and_grad(f)(jnp.array([log_ratio]))
    assert np.isfinite(value) and np.isfinite(slope).all()
    if abs(log_ratio) == 50.0:
        np.testing.assert_allclose(value, maths.surrogate(log_ratio, advantage, 0.2, 0.3), rtol=1e-4)


@pytest.mark.parametrize("clip", [0.05, 0.2, 10.0])
def test_value_loss_value_and_gradient(clip):
    rng = np.random.default_rng(3)
    values, old, returns = rng.normal(size=(3, 4, 5))

    def slow(v):
        return sum(maths.value_loss(v[i], old[i], returns[i], clip) for i in np.ndindex(4, 5))

    fixed = jnp.asarray(old, jnp.float32), jnp.asarray(returns, jnp.float32)
    f = lambda v: pg.clipped_value_loss(v, *fixed, clip=clip).sum()  # noqa: E731
    np.testing.assert_allclose(f(jnp.asarray(values, jnp.float32)), slow(values), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(f)(jnp.asarray(values, jnp.float32)), gradient(slow, values), rtol=1e-3, atol=1e-4)


def test_value_clip_by_hand():
    values, old, returns = jnp.array([3.0, 3.0, 0.1]), jnp.zeros(3), jnp.array([0.0, 5.0, 0.0])
    np.testing.assert_allclose(pg.clipped_value_loss(values, old, returns, clip=1.0), [4.5, 8.0, 0.005], rtol=1e-5)
    np.testing.assert_array_equal(pg.value_is_clipped(values, old, returns, clip=1.0), [False, True, False])
    inside, middle = jnp.linspace(0.0, 0.1, 999), jnp.full(999, 0.07)
    assert not pg.value_is_clipped(inside, middle, middle / 3, clip=0.2).any(), "rounding is no clip"
    start = jax.grad(lambda v: pg.clipped_value_loss(v, old, returns, clip=1.0).sum())(old)
    np.testing.assert_allclose(start, old - returns)


@pytest.mark.parametrize("call", [
    lambda: pg.clipped_surrogate(jnp.ones((2, 3)), jnp.ones((2, 1)), **CLIP),
    lambda: pg.clipped_sides(jnp.ones((2, 3)), jnp.ones((3,)), **CLIP),
    lambda: pg.clipped_value_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 1)), clip=0.2),
    lambda: pg.value_is_clipped(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((2, 3)), clip=0.2),
])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()
