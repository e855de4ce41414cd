"""Ratio levels, corrections for another sampler, and the masks of tokens, against values derived by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.ops import importance
from rlhf_jax.ops.shaping import overlong_punishment

MASK = jnp.array([[False, True, True, True], [True, True, False, False]])
X = jnp.log(jnp.array([[7.0, 2.0, 4.0, 1.0], [0.5, 8.0, 3.0, 3.0]]))


def test_levels():
    np.testing.assert_array_equal(importance.token_level(X, MASK), X)
    geometric = np.exp(importance.sequence_level(X, MASK))
    np.testing.assert_allclose(geometric, [[2.0] * 4, [2.0] * 4], rtol=1e-6)  # ∛(2·4·1), √(0.5·8)
    np.testing.assert_allclose(importance.sequence_token_level(X, MASK), importance.sequence_level(X, MASK), rtol=1e-6)


def test_gradients_of_the_two_sequence_levels():
    """One spreads every token's advantage over the row, the other gives each token its own."""
    advantages = jnp.array([[0.0, 1.0, 0.0, 5.0], [2.0, 0.0, 0.0, 0.0]])
    f = lambda x, level: (jnp.exp(level(x, MASK)) * advantages).sum()  # noqa: E731
    own = jax.grad(f)(X, importance.sequence_token_level)
    np.testing.assert_allclose(own, 2.0 * advantages, rtol=1e-6)
    spread = jax.grad(f)(X, importance.sequence_level)
    np.testing.assert_allclose(spread, 2.0 * np.array([[0, 2, 2, 2], [1, 1, 0, 0]]), rtol=1e-6)


@pytest.mark.parametrize(("name", "expected"), [
    ("none", [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ("token_truncate", [[1, 2, 3, 1], [0.6, 3, 1, 1]]),
    ("token_mask", [[1, 2, 0, 1], [0, 0, 1, 1]]),
    ("sequence_truncate", [[3], [3]]),
    ("sequence_mask", [[0], [0]]),
])
def test_corrections(name, expected):
    correct = functools.partial(importance.CORRECTIONS[name], correction_low=0.6, correction_high=3.0)
    np.testing.assert_allclose(correct(X, MASK), expected, rtol=1e-6)
    np.testing.assert_array_equal(correct(jnp.zeros((2, 4)), MASK), jnp.ones_like(correct(X, MASK)))
    assert np.isfinite(correct(jnp.full((2, 4), 500.0), MASK)).all()


def test_sequence_corrections_within_the_bounds_are_the_product():
    for name in ("sequence_truncate", "sequence_mask"):
        np.testing.assert_allclose(importance.CORRECTIONS[name](X, MASK, correction_low=0.0, correction_high=9.0), [[8.0], [4.0]], rtol=1e-6)


def test_rows_that_the_policy_has_left():
    log_ratios = jnp.array([[9.0, -0.4, -0.2, 0.0], [-1.0, -1.0, 9.0, 9.0]])  # of the new policy to the sampler: KL 0.2 and 1
    for limit, kept in ((0.1, [False, False]), (0.3, [True, False]), (1.5, [True, True])):
        got = importance.on_policy(jnp.full((2, 4), -1.0), log_ratios, MASK, off_policy_kl=limit)
        assert got.all(-1).tolist() == got.any(-1).tolist() == kept
    assert importance.on_policy(jnp.zeros((2, 4)), log_ratios, MASK, off_policy_kl=0.1).all()


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("tokens", [1, 5, 11, 60])
def test_high_entropy_selects_what_the_quantile_does(quantile, tokens):
    rng = np.random.default_rng(tokens)
    entropy, mask = rng.random((5, 20)).astype(np.float32), np.zeros(100, bool)
    mask[rng.permutation(100)[:tokens]] = True
    mask = mask.reshape(5, 20)
    entropy[~mask] = 9.0  # whatever stands outside does not count
    got = importance.high_entropy(jnp.asarray(entropy), jnp.asarray(mask), entropy_quantile=quantile)
    threshold = np.quantile(entropy[mask].astype(np.float64), quantile)
    np.testing.assert_array_equal(got, mask & (entropy >= threshold - 1e-7))


def test_high_entropy_of_nothing():
    assert not importance.high_entropy(jnp.ones((2, 3)), jnp.zeros((2, 3), bool), entropy_quantile=0.8).any()


def test_soft_punishment_of_length_by_hand():
    lengths = jnp.array([0, 80, 81, 90, 100, 101, 150])
    np.testing.assert_allclose(overlong_punishment(lengths, overlong_length=100, overlong_buffer=20), [0, 0, -0.05, -0.5, -1, -1, -1], atol=1e-7)
    for buffer in (0, 101):
        with pytest.raises(UserError, match=rf"overlong_buffer = {buffer}.*overlong_length = 100"):
            overlong_punishment(lengths, overlong_length=100, overlong_buffer=buffer)


@pytest.mark.parametrize("call", [
    lambda: importance.sequence_level(X, MASK[:, :1]),
    lambda: importance.token_mask(X[0], MASK[0], correction_low=0.0, correction_high=1.0),
    lambda: importance.on_policy(X, X, MASK[:, :1], off_policy_kl=1.0),
    lambda: importance.high_entropy(X, MASK[:1], entropy_quantile=0.5),
    lambda: overlong_punishment(jnp.ones((2, 2), jnp.int32), overlong_length=10, overlong_buffer=2),
])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()
