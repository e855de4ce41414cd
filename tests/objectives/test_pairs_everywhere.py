"""Facts that hold for any two log-ratios, however far out: drawn by Hypothesis over ±500 nats."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.objectives import apo_down, apo_zero, cdpo, discopop, dpo, exo, hinge, ipo, nca, robust_dpo, simpo, sppo

NATS = st.floats(-500, 500, allow_nan=False, width=32)
LOSSES = {
    "dpo": functools.partial(dpo.dpo_loss, beta=0.1), "cdpo": functools.partial(cdpo.cdpo_loss, beta=0.1, epsilon=0.1),
    "robust_dpo": functools.partial(robust_dpo.robust_dpo_loss, beta=0.1, epsilon=0.1), "hinge": functools.partial(hinge.hinge_loss, beta=0.1),
    "ipo": functools.partial(ipo.ipo_loss, tau=0.1), "exo": functools.partial(exo.exo_loss, beta=0.1, epsilon=0.1),
    "nca": functools.partial(nca.nca_loss, beta=0.1), "sppo": functools.partial(sppo.sppo_loss, eta=10.0),
    "apo_zero": functools.partial(apo_zero.apo_zero_loss, beta=0.1), "apo_down": functools.partial(apo_down.apo_down_loss, beta=0.1),
    "discopop": functools.partial(discopop.discopop_loss, beta=0.1, tau=0.05), "simpo": functools.partial(simpo.simpo_loss, beta=0.1, gamma=0.5),
}
OF_THE_MARGIN = ("dpo", "cdpo", "robust_dpo", "hinge", "ipo", "exo", "discopop", "simpo")
NEVER_RISING = ("dpo", "hinge", "simpo", "robust_dpo")  # in the chosen response's log-ratio
BOUNDED_BELOW = tuple(name for name in LOSSES if name != "robust_dpo")


@functools.cache
def compiled(name: str):
    f = LOSSES[name]
    return jax.jit(lambda c, r: (f(c, r), jax.grad(lambda *x: f(*x).sum(), (0, 1))(c, r)))


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=60, deadline=None)
@given(chosen=NATS, rejected=NATS, shift=NATS)
def test_values_and_slopes(name: str, chosen: float, rejected: float, shift: float) -> None:
    f = compiled(name)
    at = jnp.array([chosen], jnp.float32), jnp.array([rejected], jnp.float32)
    value, (up, down) = f(*at)
    assert np.isfinite(value).all() and np.isfinite(up).all() and np.isfinite(down).all()
    if name in BOUNDED_BELOW:
        assert float(value[0]) >= -1e-5
    if name in OF_THE_MARGIN:
        np.testing.assert_allclose(up, -down, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(f(at[0] + shift, at[1] + shift)[0], value, rtol=1e-3, atol=1e-3)
    if name in NEVER_RISING:
        assert float(up[0]) <= 1e-7
