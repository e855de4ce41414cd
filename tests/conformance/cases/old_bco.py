"""BCO over consecutive steps that share running moments, β = 0.1; step i reads `in<i>/…` and gives `out<i>/…`, the mean over all rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.objectives.bco import bco_loss
from rlhf_jax.ops import running
from tests.conformance.runner import Comparison, slope

BETA = 0.1


def cases(vectors):
    steps = sorted({int(key.partition("/")[0].removeprefix("in")) for key in vectors if key.startswith("in")})
    return [(f"step {step}", lambda step=step: _case(vectors, step, steps)) for step in steps]


def _inputs(v, step):
    good, bad, ref_good, ref_bad = (jnp.asarray(v[f"in{step}/{key}"]) for key in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"))
    return jnp.concatenate([good, bad]), jnp.concatenate([ref_good, ref_bad]), jnp.arange(len(good) + len(bad)) < len(good)


def _case(v, step, steps):
    moments = running.RunningMoments.empty()
    for earlier in [s for s in steps if s <= step]:
        logps, ref, desirable = _inputs(v, earlier)
        moments = running.update(moments, BETA * (logps - ref), jnp.ones(logps.shape, bool))
    shift = jnp.broadcast_to(moments.mean, logps.shape)
    f = lambda x: bco_loss(x - ref, desirable, shift, beta=BETA)  # noqa: E731
    yield Comparison("losses", f(logps), v[f"out{step}/losses"], atol=1e-6)
    gradient = jax.grad(lambda x: f(x).mean())(logps)
    for key, rows in (("grad_chosen", desirable), ("grad_rejected", ~desirable)):
        yield slope(gradient[rows], v[f"out{step}/{key}"])
    for key, value in (("delta", moments.mean), ("running_var", moments.var), ("running_std", moments.std), ("running_count", moments.count)):
        yield Comparison(key, value, v[f"out{step}/{key}"], atol=1e-6)
