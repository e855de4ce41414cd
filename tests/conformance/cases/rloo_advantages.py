"""RLOO's advantages: `beta<β>__norm<0|1>__clip<None|(low, high)>[__nan1]`; rewards weighted [1, 0.5], groups of 4, KL by k1 in the return."""

from __future__ import annotations

import ast

import jax.numpy as jnp
import numpy as np

from rlhf_jax.objectives.rloo import rloo_advantages
from rlhf_jax.ops.advantages import weighted_rewards
from rlhf_jax.ops.kl import k1
from rlhf_jax.ops.masking import masked_sum
from tests.conformance.runner import Comparison, options

GROUP, EPS, WEIGHTS = 4, 1e-4, (1.0, 0.5)


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("adv/")]


def _case(v, name):
    plain, _, rest = name.partition("__clip")
    bounds, _, nan = rest.partition("__")
    given = options(f"__{plain}", ("beta", "norm"))[1]
    scores, known = weighted_rewards(jnp.asarray(v["rewards_nan" if nan else "rewards"]), jnp.asarray(WEIGHTS))
    if bounds != "None":
        scores = jnp.clip(scores, *ast.literal_eval(bounds))
    mask = jnp.asarray(v[f"cmask/{name}"]) != 0
    returns = scores - float(given["beta"]) * masked_sum(k1(jnp.asarray(v["old_logps"] - v["ref_logps"])), mask)
    got = rloo_advantages(returns, jnp.arange(len(scores)) // GROUP, known, normalise_advantages=given["norm"] == "1", advantage_eps=EPS)
    yield Comparison("advantages", got, np.nan_to_num(v[f"adv/{name}"]), rtol=1e-5, atol=2e-6)
