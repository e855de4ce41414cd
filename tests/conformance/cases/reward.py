"""Bradley–Terry: "plain", "margin", "center<c>", "margin_center<c>"; the chosen rows come first."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax.objectives.reward import bradley_terry_loss, centring_loss
from tests.conformance.cases._maths import value_and_slope
from tests.conformance.runner import NoFunction, options


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("loss/")]


def _case(v, name):
    _, given = options(f"__{name}", ("plain", "margin", "center"))
    if {"plain", "margin", "center"} <= given.keys():
        raise NoFunction(name)
    margin = jnp.asarray(v["margin"]) * ("margin" in given)

    def f(rewards):
        chosen, rejected = jnp.split(rewards, 2)
        losses = bradley_terry_loss(chosen, rejected, margin)
        return (losses + centring_loss(chosen, rejected, center_coef=float(given.get("center", 0.0)))).mean()

    yield from value_and_slope(f, v["rewards"], v[f"loss/{name}"], v[f"grad/{name}"])
