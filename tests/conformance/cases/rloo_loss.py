"""RLOO's loss on the sequence's ratio: `eps<ε>`."""

from __future__ import annotations

import math

import jax.numpy as jnp

from rlhf_jax.objectives.rloo import rloo_loss
from tests.conformance.cases._maths import value_and_slope
from tests.conformance.runner import options


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("loss/")]


def _case(v, name):
    eps = float(options(f"__{name}", ("eps",))[1]["eps"])
    mask, old = jnp.asarray(v["mask"]) != 0, jnp.asarray(v["old_logps"])
    advantages = jnp.broadcast_to(jnp.asarray(v["advantages"])[:, None], mask.shape)
    f = lambda logps: rloo_loss(logps - old, advantages, mask, clip_low=eps, clip_high=eps, dual_clip=math.inf)[0].mean()  # noqa: E731
    yield from value_and_slope(f, v["new_logps"], v[f"loss/{name}"], v[f"grad/{name}"])
