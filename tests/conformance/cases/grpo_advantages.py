"""Advantages of rewards [B, K] in groups of 4: `<scale>__<sum_then_normalize|normalize_then_sum>[__nan1]`, eps = 1e-4.

TRL scales the sum by the group's, the batch's or no deviation; "normalize_then_sum" brings each reward to its group's scale first, whatever the
name's scale. A row that no reward could score has advantage 0 here; TRL gives the same, or NaN, which counts as 0.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from rlhf_jax.ops.advantages import SCALES, decoupled_advantages, weighted_rewards
from tests.conformance.runner import Comparison, NoFunction

GROUP, EPS = 4, 1e-4


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("adv/")]


def _case(v, name):
    scale, order, *rest = name.split("__")
    if scale not in SCALES or order not in ("sum_then_normalize", "normalize_then_sum") or rest not in ([], ["nan1"]):
        raise NoFunction(name)
    rewards, weights = jnp.asarray(v["rewards_nan" if rest else "rewards"]), jnp.asarray(v["reward_weights"], jnp.float32)
    ids = jnp.arange(len(rewards)) // GROUP
    if order == "sum_then_normalize":
        scores, known = weighted_rewards(rewards, weights)
        got = SCALES[scale](scores, ids, known, eps=EPS)
    else:
        got = decoupled_advantages(rewards, weights, ids, jnp.ones(len(rewards), bool), eps=EPS)
    yield Comparison("advantages", got, np.nan_to_num(v[f"adv/{name}"]), rtol=1e-5, atol=2e-6)
