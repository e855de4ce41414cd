"""GAE and group advantages against loops written from the papers, and values derived by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.advantages import (
    SCALES,
    decoupled_advantages,
    gae,
    group_advantages,
    group_centred,
    group_statistics,
    leave_one_out_advantages,
    standardised,
    weighted_rewards,
)
from tests.reference import maths


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 9)])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("jitted", [False, True])
def test_gae_against_the_loop(shape, gamma, lam, jitted):
    rng = np.random.default_rng(shape[1])
    rewards, values = rng.normal(size=shape), rng.normal(size=shape)
    mask = rng.random(shape) < 0.6  # holes are environment tokens
    mask[-1] = False
    f = functools.partial(gae, gamma=gamma, lam=lam)
    f = jax.jit(f) if jitted else f
    advantages, returns = f(jnp.asarray(rewards, jnp.float32), jnp.asarray(values, jnp.float32), jnp.asarray(mask))
    slow = maths.gae(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, slow, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, slow + values, 0.0), rtol=1e-4, atol=1e-5)


def test_gae_by_hand():
    mask = jnp.array([[False, True, False, True]])
    rewards, values = jnp.array([[9.0, 1.0, 9.0, 2.0]]), jnp.array([[9.0, 0.5, 9.0, 0.25]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    last = 2.0 - 0.25
    first = (1.0 + 0.5 * 0.25 - 0.5) + 0.25 * last
    np.testing.assert_allclose(advantages, [[0.0, first, 0.0, last]])
    np.testing.assert_allclose(returns, [[0.0, first + 0.5, 0.0, 2.0]])


def test_monte_carlo_returns_ignore_the_values():
    rewards, mask = jnp.array([[0.0, 0.0, 3.0, 0.0]]), jnp.array([[True, True, True, False]])
    for values in (jnp.zeros((1, 4)), jnp.array([[5.0, -2.0, 7.0, 1.0]])):
        np.testing.assert_allclose(gae(rewards, values, mask, gamma=1.0, lam=1.0)[1], [[3.0, 3.0, 3.0, 0.0]], atol=1e-6)


def test_nothing_outside_the_mask_matters():
    rng = np.random.default_rng(2)
    rewards, values = rng.normal(size=(3, 6)).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)
    mask = rng.random((3, 6)) < 0.5
    clean = gae(jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask), gamma=0.9, lam=0.9)
    dirty = [jnp.asarray(np.where(mask, x, np.nan)) for x in (rewards, values)]
    np.testing.assert_array_equal(clean, gae(*dirty, jnp.asarray(mask), gamma=0.9, lam=0.9))
    for b in range(3):  # masked = filtered
        kept = [jnp.asarray(x[b, mask[b]])[None] for x in (rewards, values)]
        short = gae(*kept, jnp.ones(kept[0].shape, bool), gamma=0.9, lam=0.9)[0]
        np.testing.assert_allclose(clean[0][b][mask[b]], short[0], rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_group_advantages_against_the_loop(seed):
    rng = np.random.default_rng(seed)
    rows = 12
    scores = rng.normal(size=rows).astype(np.float32)
    groups = rng.permutation(np.repeat(np.arange(4), 3))  # members need not be neighbours
    scores[groups == 1] = 0.1  # a constant whose float32 mean is not exactly 0.1
    real = rng.random(rows) < 0.8
    got = group_advantages(jnp.asarray(np.where(real, scores, np.nan)), jnp.asarray(groups), jnp.asarray(real), eps=1e-4)
    np.testing.assert_allclose(got, maths.group_advantages(scores, groups, real, 1e-4), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(got[groups == 1], 0.0)
    np.testing.assert_array_equal(got[~real], 0.0)


def test_group_statistics_by_hand():
    stats = group_statistics(jnp.array([1.0, 3.0, 5.0, 5.0, 7.0, 9.0]), jnp.array([0, 0, 2, 2, 3, 0]),
                             jnp.array([True, True, True, True, True, False]))
    np.testing.assert_array_equal(stats.count, [2, 0, 2, 1, 0, 0])
    np.testing.assert_allclose(stats.mean, [2.0, 0.0, 5.0, 7.0, 0.0, 0.0])
    np.testing.assert_allclose(stats.std, [2**0.5, 0.0, 0.0, 0.0, 0.0, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(stats.constant, [False, True, True, True, True, True])


SCORES, IDS = jnp.array([1.0, 3.0, 8.0, 5.0, 5.0, jnp.nan]), jnp.array([0, 0, 0, 2, 2, 2])
KNOWN = ~jnp.isnan(SCORES)


def test_three_scales_by_hand():
    centred = np.array([-3.0, -1.0, 4.0, 0.0, 0.0, 0.0])
    group, batch = np.std([1, 3, 8], ddof=1), np.std([1, 3, 8, 5, 5], ddof=1)
    for name, scale in (("none", 1.0), ("group", group + 0.1), ("batch", batch + 0.1)):
        np.testing.assert_allclose(SCALES[name](SCORES, IDS, KNOWN, eps=0.1), centred / scale, rtol=1e-5)
    np.testing.assert_array_equal(group_centred(SCORES, IDS, KNOWN), centred.astype(np.float32))


def test_leave_one_out_by_hand():
    np.testing.assert_allclose(leave_one_out_advantages(SCORES, IDS, KNOWN), [1 - 5.5, 3 - 4.5, 8 - 2.0, 0.0, 0.0, 0.0], rtol=1e-6)
    alone = jnp.array([True, False, False, True, False, False])
    assert not np.asarray(leave_one_out_advantages(SCORES, IDS, alone)).any()


def test_the_baseline_of_a_row_does_not_depend_on_its_own_score():
    moved = leave_one_out_advantages(SCORES.at[0].add(7.0), IDS, KNOWN) - leave_one_out_advantages(SCORES, IDS, KNOWN)
    np.testing.assert_allclose(moved, [7.0, -3.5, -3.5, 0.0, 0.0, 0.0], rtol=1e-6)


def test_standardised():
    got = standardised(SCORES, KNOWN, eps=1e-4)
    np.testing.assert_allclose([got[:5].mean(), np.std(got[:5], ddof=1), got[5]], [0.0, 1.0, 0.0], atol=1e-3)


def test_several_rewards():
    nan = float("nan")
    rewards, weights = jnp.array([[1.0, 10.0], [2.0, nan], [nan, nan], [3.0, 40.0]]), jnp.array([1.0, 0.5])
    scores, known = weighted_rewards(rewards, weights)
    np.testing.assert_allclose(scores, [6.0, 2.0, 0.0, 23.0])
    assert known.tolist() == [True, True, False, True]
    # Of two rewards that disagree the weightier one decides, though the other's spread is a hundred times larger.
    rewards = jnp.array([[0.0, 100.0], [1.0, 0.0], [0.0, 100.0], [1.0, 0.0]])
    got = decoupled_advantages(rewards, jnp.array([1.0, 0.5]), jnp.zeros(4, jnp.int32), jnp.array([True, True, True, False]), eps=1e-4)
    assert got[1] > 0 > got[0] and got[0] == got[2] and got[3] == 0


@pytest.mark.parametrize("call", [
    lambda: leave_one_out_advantages(jnp.ones(3), jnp.zeros(3, jnp.int32), jnp.ones(1, bool)),
    lambda: standardised(jnp.ones((3, 1)), jnp.ones((3, 1), bool), eps=1e-4),
    lambda: decoupled_advantages(jnp.ones((3, 2)), jnp.ones(2), jnp.zeros(1, jnp.int32), jnp.ones(3, bool), eps=1e-4),
    lambda: weighted_rewards(jnp.ones((3, 2)), jnp.ones(3)),
    lambda: gae(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((2, 3), bool), gamma=1.0, lam=1.0),
    lambda: gae(jnp.ones(3), jnp.ones(3), jnp.ones(3, bool), gamma=1.0, lam=1.0),
    lambda: group_statistics(jnp.ones(3), jnp.zeros(1, jnp.int32), jnp.ones(3, bool)),
    lambda: group_statistics(jnp.ones(3), jnp.zeros(3), jnp.ones(3, bool)),
    lambda: group_advantages(jnp.ones(3), jnp.zeros(3, jnp.int32), jnp.ones(1, bool), eps=1e-4),
])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()
