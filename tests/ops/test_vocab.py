"""Readings of logits against NumPy float64, extreme logits included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import vocab
from tests.reference import maths
from tests.reference.numeric import gradient


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 7), (2, 2, 3, 4)])
@pytest.mark.parametrize("jitted", [False, True])
def test_values_against_the_loop(shape, jitted):
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=shape) * 5, rng.integers(0, shape[-1], shape[:-1])
    got = {f.__name__: (jax.jit(f) if jitted else f)(jnp.asarray(logits, jnp.float32), jnp.asarray(target))
           for f in (vocab.logps, vocab.entropy, vocab.lse, vocab.log_sum_sq_probs)}
    for index in np.ndindex(*shape[:-1]):
        log_p = maths.log_softmax(logits[index])
        np.testing.assert_allclose(got["logps"][index], log_p[target[index]], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got["entropy"][index], -sum(np.exp(v) * v for v in log_p), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got["lse"][index], np.log(sum(np.exp(v) for v in logits[index])), rtol=1e-5)
        np.testing.assert_allclose(got["log_sum_sq_probs"][index], np.log(sum(np.exp(v) ** 2 for v in log_p)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["logps", "entropy", "lse"])
def test_gradients_by_finite_differences(name):
    logits = np.random.default_rng(1).normal(size=(1, 5))

    def slow(z):
        log_p = maths.log_softmax(z[0])
        return {"logps": log_p[2], "entropy": -sum(np.exp(v) * v for v in log_p), "lse": z[0][0] - log_p[0]}[name]

    fast = jax.grad(lambda z: getattr(vocab, name)(z, jnp.array([2])).sum())(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(fast, gradient(slow, logits), rtol=1e-4, atol=1e-5)


def test_extremes():
    uniform = jnp.zeros((1, 8))
    np.testing.assert_allclose(vocab.entropy(uniform, jnp.array([0])), np.log(8), rtol=1e-6)
    far = jnp.array([[1e4, 0.0, -jnp.inf]])
    np.testing.assert_allclose(vocab.logps(far, jnp.array([1])), [-1e4])
    value, slope = jax.value_and_grad(lambda z: vocab.entropy(z, jnp.array([0])).sum())(jnp.array([[0.0, 0.0, -1e9]]))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert np.isfinite(slope).all()
    assert np.isfinite(vocab.entropy(far, jnp.array([0]))).all()


def test_half_precision_logits_are_read_in_float32():
    assert vocab.logps(jnp.ones((1, 4), jnp.bfloat16), jnp.array([0])).dtype == jnp.float32


@pytest.mark.parametrize("f", [vocab.logps, vocab.entropy, vocab.lse, vocab.log_sum_sq_probs])
def test_wrong_shapes_are_refused(f):
    with pytest.raises(AssertionError):
        f(jnp.ones((2, 3, 5)), jnp.ones((2, 4), jnp.int32))
    with pytest.raises(AssertionError):
        f(jnp.ones((2, 5)), jnp.ones((2, 5), jnp.int32))
