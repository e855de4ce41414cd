"""Masked mean, unbiased variance and whitening."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax.ops.masking import masked_moments, whiten
from tests.conformance.runner import Comparison


def cases(vectors):
    return [("moments", lambda: _moments(vectors)), ("whiten", lambda: _whiten(vectors))]


def _moments(v):
    mean, variance = masked_moments(jnp.asarray(v["x"]), jnp.asarray(v["mask"]))
    yield Comparison("mean", mean, v["mean"])
    yield Comparison("variance", variance, v["var"])


def _whiten(v):
    x, mask = jnp.asarray(v["x"]), jnp.asarray(v["mask"])
    for keep_mean, name in ((False, "whiten"), (True, "whiten_noshift")):
        yield Comparison(name, whiten(x, mask, keep_mean=keep_mean), jnp.where(mask, v[name], 0.0), atol=1e-6)
