"""PPO's clipped losses. A case is a name; its (clip, value clip, value coefficient) stand in the vectors' README."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.ops.policy_gradient import clipped_surrogate, clipped_value_loss, value_is_clipped
from rlhf_jax.types import Mean
from tests.conformance.runner import Comparison, NoFunction, slope

SETTINGS = {"default": (0.2, 0.2, 0.1), "wide": (10.0, 10.0, 0.5), "tight": (0.05, 0.05, 1.0)}


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("loss/")]


def _case(v, name):
    if name not in SETTINGS:
        raise NoFunction(f"the setting {name!r}; known are {', '.join(SETTINGS)}")
    clip, value_clip, value_coef = SETTINGS[name]
    mask, value_mask = ~jnp.asarray(v["padding_mask"]), ~jnp.asarray(v["padding_mask_p1"])
    old_logps, advantages, old_values, returns = (jnp.asarray(v[key]) for key in ("old_logprobs", "advantages", "values", "returns"))

    def parts(logps, values):
        policy = clipped_surrogate(jnp.where(mask, logps - old_logps, 0.0), advantages, clip_low=clip, clip_high=clip)
        value = clipped_value_loss(values, old_values, returns, clip=value_clip)
        return Mean.of(policy, mask).compute(), Mean.of(value, value_mask).compute()

    def total(logps, values):
        policy, value = parts(logps, values)
        return policy + value_coef * value

    at = jnp.asarray(v["new_logprobs"]), jnp.asarray(v["vpred"])
    for got, key in zip(jax.jit(parts)(*at), ("pg_loss", "vf_loss")):
        yield Comparison(key, got, v[f"{key}/{name}"])
    loss, slopes = jax.jit(jax.value_and_grad(total, (0, 1)))(*at)
    yield Comparison("loss", loss, v[f"loss/{name}"])
    for got, key in zip(slopes, ("grad_new", "grad_vpred")):
        yield slope(got, v[f"{key}/{name}"])
    clipped = value_is_clipped(at[1], old_values, returns, clip=value_clip)
    yield Comparison("clipped fraction", Mean.of(clipped, value_mask).compute(), v[f"vf_clipfrac/{name}"])
