"""Scores of f-divergences: derivatives of their f, and each other's limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.divergences import MAX_EXPONENT, SCORES, alpha_score
from tests.reference.numeric import gradient

F = {
    "reverse_kl": lambda t, alpha: t * math.log(t),
    "forward_kl": lambda t, alpha: -math.log(t),
    "jensen_shannon": lambda t, alpha: t * math.log(t) - (t + 1) * math.log((t + 1) / 2),
    "alpha": lambda t, alpha: (t ** (1 - alpha) - (1 - alpha) * t - alpha) / (alpha * (alpha - 1)),
}


@pytest.mark.parametrize(("name", "alpha"), [(name, 0.3) for name in SCORES] + [("alpha", -0.5), ("alpha", 2.0)])
def test_a_score_is_the_derivative_of_f_shifted_to_0_at_the_reference(name, alpha):
    f = functools.partial(F[name], alpha=alpha)
    for u in (-2.0, -0.3, 0.0, 0.5, 3.0):
        slope, at_one = (gradient(lambda t: f(t.item()), np.array(t), step=1e-6 * t) for t in (math.exp(u), 1.0))
        np.testing.assert_allclose(SCORES[name](jnp.float32(u), alpha=alpha), slope - at_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCORES)
def test_scores_rise_and_stay_finite(name):
    u = jnp.asarray([-500.0, -50.0, -1.0, 0.0, 1.0, 50.0])
    scores, slopes = jax.vmap(jax.value_and_grad(lambda x: SCORES[name](x, alpha=0.5)))(u)
    assert np.isfinite(scores).all() and np.isfinite(slopes).all() and (np.diff(scores[1:]) >= 0).all() and (slopes >= 0).all()


def test_squares_of_the_steepest_slopes_are_finite():
    steepest = jnp.float32(-MAX_EXPONENT + 1e-3)
    slopes = jnp.stack([jax.grad(lambda x, f=f: f(x, alpha=1.0))(steepest) for f in SCORES.values()])
    assert slopes.max() > 1e13 and np.isfinite(jnp.square(slopes).sum())
    assert jax.grad(lambda x: alpha_score(x, alpha=1.0))(jnp.float32(-MAX_EXPONENT - 1.0)) == 0.0


def test_alpha_lies_between_the_two_kls():
    u = jnp.asarray([-1.5, 0.2, 2.0])
    np.testing.assert_allclose(alpha_score(u, alpha=0.0), u)
    np.testing.assert_allclose(alpha_score(u, alpha=1e-4), u, rtol=1e-3)
    np.testing.assert_allclose(alpha_score(u, alpha=1.0), SCORES["forward_kl"](u, alpha=0.0), rtol=1e-6)
