"""Masked reductions: hand values, empty masks, garbage under the mask, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import masking
from rlhf_jax.types import Sequences
from tests.reference import maths

SEGMENTS = jnp.array([[0, 1, 1, 2, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], jnp.int32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 4)])
def test_reductions_equal_the_filtered_array(shape):
    rng = np.random.default_rng(sum(shape))
    x, mask = rng.normal(size=shape).astype(np.float32), rng.random(shape) < 0.5
    dirty = np.where(mask, x, np.nan)
    total, mean = masking.masked_sum(jnp.asarray(dirty), jnp.asarray(mask)), masking.masked_mean(jnp.asarray(dirty), jnp.asarray(mask))
    for index in np.ndindex(*shape[:-1]):
        kept = x[index][mask[index]].astype(np.float64)
        np.testing.assert_allclose(total[index], kept.sum(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mean[index], kept.mean() if kept.size else 0.0, rtol=1e-5, atol=1e-6)
    got_mean, got_variance = masking.masked_moments(jnp.asarray(dirty), jnp.asarray(mask))
    np.testing.assert_allclose(got_mean, maths.mean(x, mask), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_variance, maths.variance(x, mask), rtol=1e-4, atol=1e-6)
    for keep_mean in (True, False):
        got = masking.whiten(jnp.asarray(dirty), jnp.asarray(mask), keep_mean=keep_mean)
        np.testing.assert_allclose(got, maths.whiten(x, mask, keep_mean), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("constant", [0.7, 10.3, 100.3])
def test_whitening_a_constant_gives_zeros_and_no_rounding(constant):
    mask = jnp.asarray(np.random.default_rng(0).random((100, 300)) < 0.7)
    got = jax.jit(functools.partial(masking.whiten, keep_mean=False))(jnp.full((100, 300), constant, jnp.float32), mask)
    assert float(jnp.abs(got).max()) < 1e-3 * constant


def test_whitening_keeps_or_removes_the_mean():
    x, mask = jnp.array([[1.0, 3.0, 99.0]]), jnp.array([[True, True, False]])
    np.testing.assert_allclose(masking.whiten(x, mask, keep_mean=False), [[-(0.5**0.5), 0.5**0.5, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(masking.whiten(x, mask, keep_mean=True), [[2 - 0.5**0.5, 2 + 0.5**0.5, 0.0]], rtol=1e-6)


def test_an_empty_mask_gives_zero_and_a_zero_gradient():
    x, empty = jnp.array([[1.0, -2.0]]), jnp.zeros((1, 2), bool)
    for reduce in (masking.masked_sum, masking.masked_mean, lambda x, m: masking.whiten(x, m, keep_mean=True)):
        value, gradient = jax.value_and_grad(lambda x, f=reduce: f(x, empty).sum())(x)
        assert float(value) == 0.0
        np.testing.assert_array_equal(gradient, 0.0)
    assert [float(m) for m in masking.masked_moments(x, empty)] == [0.0, 0.0]


def test_masked_mean_has_the_gradient_of_the_filtered_mean():
    x, mask = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([True, False, True, False])
    np.testing.assert_allclose(jax.grad(lambda x: masking.masked_mean(x, mask) ** 2)(x), [2.0, 0.0, 2.0, 0.0])


def test_last_indices_with_padding_on_either_side():
    np.testing.assert_array_equal(masking.last_real_index(SEGMENTS), [3, 1, 0])
    np.testing.assert_array_equal(masking.last_index(jnp.array([[True, True, False], [False] * 3])), [1, 0])
    x = jnp.arange(15.0).reshape(3, 5)
    np.testing.assert_array_equal(masking.at_last_real(x, SEGMENTS), [3.0, 6.0, 10.0])
    np.testing.assert_array_equal(masking.at_last_real(x[:, None], SEGMENTS[:, None]), [[3.0], [6.0], [10.0]])


def test_place_at_last_puts_the_score_on_the_last_true_token_only():
    mask = jnp.array([[False, True, False, True, False], [False] * 5, [True] + [False] * 4])
    placed = masking.place_at_last(jnp.array([2.0, jnp.nan, -1.0]), mask)
    np.testing.assert_array_equal(placed, [[0, 0, 0, 2.0, 0], [0] * 5, [-1.0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(masking.place_at_last(jnp.float32(3.0), mask[0]), [0, 0, 0, 3.0, 0])


def test_segment_starts_and_loss_tokens_follow_law_1():
    starts = masking.segment_starts(SEGMENTS)
    np.testing.assert_array_equal(starts[0], [True, True, False, True, True])
    seqs = Sequences(tokens=SEGMENTS, positions=SEGMENTS, segment_ids=SEGMENTS, loss_mask=jnp.ones(SEGMENTS.shape, bool))
    np.testing.assert_array_equal(masking.loss_tokens(seqs), ~starts)  # a mask that is true everywhere still skips pads and starts
    nothing = seqs.replace(loss_mask=jnp.zeros(SEGMENTS.shape, bool))
    assert not masking.loss_tokens(nothing).any()


def test_padding_is_the_segment_id_and_never_the_token():
    tokens = jnp.zeros((1, 3), jnp.int32)  # the pad token's id, and yet three real tokens
    seqs = Sequences(tokens=tokens, positions=tokens, segment_ids=jnp.ones_like(tokens), loss_mask=jnp.ones((1, 3), bool))
    np.testing.assert_array_equal(masking.loss_tokens(seqs), [[False, True, True]])
    np.testing.assert_array_equal(masking.last_real_index(seqs.segment_ids), [2])


@pytest.mark.parametrize("call", [
    lambda: masking.masked_sum(jnp.ones(3), jnp.ones(1, bool)),
    lambda: masking.masked_mean(jnp.ones((2, 3)), jnp.ones((3,), bool)),
    lambda: masking.masked_moments(jnp.ones((2, 3)), jnp.ones((2, 1), bool)),
    lambda: masking.whiten(jnp.ones((2, 3)), jnp.ones((1, 3), bool), keep_mean=False),
    lambda: masking.last_real_index(jnp.ones(3)),
    lambda: masking.last_index(jnp.ones(3)),
    lambda: masking.at_last_real(jnp.ones((2, 3)), jnp.ones((2, 4), jnp.int32)),
    lambda: masking.place_at_last(jnp.ones(2), jnp.ones((3, 4), bool)),
    lambda: masking.segment_starts(jnp.ones(3)),
    lambda: masking.loss_tokens(Sequences(tokens=SEGMENTS, positions=SEGMENTS, segment_ids=SEGMENTS, loss_mask=jnp.ones((3, 1), bool))),
])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()
