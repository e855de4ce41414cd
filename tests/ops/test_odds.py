"""Odds in log space, at both ends."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.odds import log1mexp, log_odds


@pytest.mark.parametrize("x", [-1e-6, -1e-3, -0.5, -math.log(2), -1.0, -20.0, -80.0])
def test_log1mexp(x):
    value, slope = jax.value_and_grad(log1mexp)(jnp.float32(x))
    x = float(np.float32(x))
    np.testing.assert_allclose(value, math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x)), rtol=2e-6)
    np.testing.assert_allclose(slope, math.exp(x) / math.expm1(x), rtol=2e-6)


def test_log_odds():
    p = np.array([0.01, 0.5, 0.9])
    np.testing.assert_allclose(log_odds(jnp.log(jnp.asarray(p, jnp.float32))), np.log(p / (1 - p)), rtol=1e-5, atol=1e-6)
    value, slope = jax.value_and_grad(log_odds)(jnp.float32(0.0))  # a certain response, or an empty one
    np.testing.assert_allclose(value, math.log(1e6), rtol=1e-3)
    assert float(slope) == 0.0
    assert np.isfinite(jax.grad(log_odds)(jnp.float32(-500.0)))
