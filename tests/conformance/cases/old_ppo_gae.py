"""PPO's rewards, GAE and whitening: `<estimator>_whiten<0|1>_g<gamma>_l<lambda>`, with a KL coefficient of 0.05.

TRL puts the score one slot behind the last token where there is room, and masks rewards there; ours sits on the last slot of a mask, so the
longer mask gives TRL's.
"""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax.ops.advantages import gae
from rlhf_jax.ops.kl import ESTIMATORS
from rlhf_jax.ops.masking import place_at_last, whiten
from tests.conformance.runner import Comparison, NoFunction, options

KL_COEF = 0.05


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("rewards/")]


def _case(v, name):
    _, given = options(f"__{name}", ("k", "whiten", "g", "l"))
    estimator = ESTIMATORS.get(f"k{given['k']}")
    if estimator is None:
        raise NoFunction(f"the estimator k{given['k']}")
    longer, mask = ~jnp.asarray(v["padding_mask_p1"]), ~jnp.asarray(v["padding_mask"])
    log_ratios = jnp.where(mask, jnp.asarray(v["logprobs"]) - jnp.asarray(v["ref_logprobs"]), 0.0)
    rewards = jnp.where(mask, -KL_COEF * estimator(log_ratios), 0.0) + place_at_last(jnp.asarray(v["scores"]), longer)
    if given["whiten"] == "1":
        rewards = whiten(rewards, longer, keep_mean=True)
    yield Comparison("rewards", rewards, v[f"rewards/{name}"], atol=1e-6)
    advantages, returns = gae(rewards, jnp.asarray(v["values"]), longer, gamma=float(given["g"]), lam=float(given["l"]))
    yield Comparison("returns", returns, jnp.where(longer, v[f"returns/{name}"], 0.0), atol=2e-6)
    yield Comparison("advantages", whiten(advantages, mask, keep_mean=False), v[f"advantages/{name}"], atol=2e-6)
