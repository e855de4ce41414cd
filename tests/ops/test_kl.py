"""KL estimators: values, and their expectation and gradient against the exact KL, enumerated over a small vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.kl import ESTIMATORS, MAX_LOG_RATIO, exp_ratio, from_reference, k1, k2, k3
from tests.reference import maths

X = np.array([-50.0, -3.0, -1e-3, 0.0, 1e-6, 1e-3, 0.7, 3.0, 50.0])


@pytest.mark.parametrize("estimator, slow", [(k1, lambda x: x), (k2, lambda x: x * x / 2), (k3, maths.k3)])
@pytest.mark.parametrize("jitted", [False, True])
def test_values(estimator, slow, jitted):
    got = (jax.jit(estimator) if jitted else estimator)(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(got, [slow(float(np.float32(x))) for x in X], rtol=1e-4, atol=1e-9)  # float32 keeps x to 6e-8 · |x|


def test_k3_is_never_negative_and_has_finite_gradients():
    x = jnp.asarray(np.concatenate([np.linspace(-1e-3, 1e-3, 999), [-200.0, -60.0, 60.0, 200.0]]), jnp.float32)
    assert (k3(x) >= 0).all()
    assert np.isfinite(k3(x)).all() and np.isfinite(jax.vmap(jax.grad(k3))(x)).all()
    inside = X[np.abs(X) > 1e-4]
    np.testing.assert_allclose(jax.vmap(jax.grad(k3))(jnp.asarray(inside, jnp.float32)), 1 - np.exp(-inside), rtol=1e-4)


def test_the_other_direction_by_hand():
    """1 − e⁻ˣ (1 + x): small ones are x²/2, and none is negative or infinite."""
    x = jnp.asarray([0.0, np.log(2.0), -np.log(2.0), 1e-2, -200.0, 200.0], jnp.float32)
    got = from_reference(x)
    np.testing.assert_allclose(got[:4], [0.0, 0.5 - 0.5 * np.log(2.0), 2.0 * np.log(2.0) - 1.0, 1 - np.exp(-0.01) * 1.01], rtol=1e-4)
    assert np.isfinite(got).all() and (got >= 0).all() and float(got[5]) == 1.0
    assert (from_reference(jnp.linspace(-1e-3, 1e-3, 999)) >= 0).all()


def test_exp_ratio_saturates():
    assert float(exp_ratio(jnp.float32(0.0))) == 1.0
    np.testing.assert_allclose(exp_ratio(jnp.float32(50.0)), np.exp(50.0), rtol=1e-4)
    np.testing.assert_allclose(exp_ratio(jnp.float32(1e4)), np.exp(MAX_LOG_RATIO), rtol=1e-4)
    assert float(jax.grad(exp_ratio)(1e4)) == 0.0


def _expected(estimator, z, ref, *, weighted=False):
    """E over actions drawn from the *fixed* policy, enumerated; with `weighted`, importance-weighted by π/π_old."""
    log_p = jax.nn.log_softmax(z)
    drawn = jax.lax.stop_gradient(log_p)
    weight = exp_ratio(log_p - drawn) if weighted else 1.0
    return (jnp.exp(drawn) * weight * estimator(log_p - jax.nn.log_softmax(ref))).sum()


def _kl(z, ref):
    log_p = jax.nn.log_softmax(z)
    return (jnp.exp(log_p) * (log_p - jax.nn.log_softmax(ref))).sum()


@pytest.mark.parametrize("seed", [0, 1])
def test_expectations_and_gradients_against_the_exact_kl(seed):
    rng = np.random.default_rng(seed)
    z, ref = jnp.asarray(rng.normal(size=6), jnp.float32), jnp.asarray(rng.normal(size=6), jnp.float32)
    exact, forward = jax.grad(_kl)(z, ref), jax.grad(lambda z: _kl(ref, z))(z)
    close = {"rtol": 1e-3, "atol": 1e-5}
    np.testing.assert_allclose(_expected(k1, z, ref), _kl(z, ref), **close)
    np.testing.assert_allclose(_expected(k3, z, ref), _kl(z, ref), **close)
    np.testing.assert_allclose(_expected(from_reference, z, ref), _kl(ref, z), **close)
    assert abs(float(_expected(k2, z, ref) - _kl(z, ref))) > 1e-2  # biased in value
    np.testing.assert_allclose(jax.grad(_expected, 1)(k1, z, ref), np.zeros(6), atol=1e-6)
    np.testing.assert_allclose(jax.grad(_expected, 1)(k2, z, ref), exact, **close)
    np.testing.assert_allclose(jax.grad(_expected, 1)(k3, z, ref), forward, **close)
    assert float(jnp.abs(exact - forward).max()) > 1e-2  # the two directions differ here, so the line above says something
    weighted = jax.grad(lambda z: _expected(k3, z, ref, weighted=True))(z)
    np.testing.assert_allclose(weighted, exact, **close)


def _in_the_reward(estimator, z, ref):
    """E of the policy gradient's surrogate, the penalty being part of the reward: detached, times log π."""
    log_p = jax.nn.log_softmax(z)
    drawn = jax.lax.stop_gradient(log_p)
    return (jnp.exp(drawn) * estimator(drawn - jax.nn.log_softmax(ref)) * log_p).sum()


def test_in_the_reward_k1_has_the_gradient_of_the_kl_and_the_others_have_not():
    """The other way round than in the loss, where k1's is zero and k2's is right: each estimator has its place."""
    rng = np.random.default_rng(0)
    z, ref = jnp.asarray(rng.normal(size=6), jnp.float32), jnp.asarray(rng.normal(size=6), jnp.float32)
    exact = jax.grad(_kl)(z, ref)
    slopes = {name: jax.grad(_in_the_reward, 1)(estimator, z, ref) for name, estimator in ESTIMATORS.items()}
    np.testing.assert_allclose(slopes["k1"], exact, rtol=1e-3, atol=1e-5)
    assert min(float(jnp.abs(slopes[name] - exact).max()) for name in ("k2", "k3")) > 1e-2
    weighted = {name: jax.grad(lambda z, e=e: _expected(e, z, ref, weighted=True))(z) for name, e in ESTIMATORS.items()}  # unbiased_kl
    for name in ("k1", "k3"):
        np.testing.assert_allclose(weighted[name], exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("f", [k1, k2, k3, exp_ratio, from_reference])
def test_wrong_types_are_refused(f):
    with pytest.raises(AssertionError):
        f(jnp.ones(3, jnp.int32))
