"""KTO and APO-zero on single responses; β = 0.1 and weights of 1 unless the name says otherwise, "neg_kl_clamped" takes another reference."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax.objectives.apo_zero_unpaired import apo_zero_unpaired_loss
from rlhf_jax.objectives.kto import kto_loss, reference_point
from rlhf_jax.ops.masking import masked_sum
from tests.conformance.cases._maths import value_and_slope
from tests.conformance.runner import Comparison, NoFunction, options


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("loss/")]


def _case(v, name):
    loss, given = options(name, ("beta", "w_des", "und", "neg_kl_clamped"))
    beta = float(given.get("beta", 0.1))
    mask, good, ref = jnp.asarray(v["completion_mask"])[:, 1:] != 0, jnp.asarray(v["label"]), jnp.asarray(v["ref_logps"])
    mismatched = v["kl_policy_logps"] - v["kl_ref_logps_neg" if "neg_kl_clamped" in given else "kl_ref_logps"]
    point = reference_point(jnp.asarray(mismatched.sum(1)), jnp.ones(len(mismatched), bool))

    def f(logps):
        ratios = masked_sum(logps - ref, mask)
        if loss == "kto":
            baseline = jnp.broadcast_to(point, ratios.shape)
            weights = {"desirable_weight": float(given.get("w_des", 1.0)), "undesirable_weight": float(given.get("und", 1.0))}
            return kto_loss(ratios, good, baseline, beta=beta, **weights).mean()
        if loss == "apo_zero_unpaired":
            return apo_zero_unpaired_loss(ratios, good, beta=beta).mean()
        raise NoFunction(loss)

    yield from value_and_slope(f, v["policy_logps"], v[f"loss/{name}"], v[f"grad/{name}"], mask)
    yield Comparison("reference point", point if loss == "kto" else 0.0, v[f"kl/{name}"], atol=1e-6)
