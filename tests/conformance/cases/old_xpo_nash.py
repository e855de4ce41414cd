"""XPO with the pair losses sigmoid and IPO (β = 0.1, α = 0.01), and Nash-MD (τ = 0.1) in TRL's form of the KL."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.objectives.ipo import ipo_loss
from rlhf_jax.objectives.nash_md import preference_loss, token_kl_loss
from rlhf_jax.objectives.xpo import optimism
from tests.conformance.runner import Comparison, NoFunction, slope

BETA, ALPHA = 0.1, 0.01
PAIR_LOSSES = {"sigmoid": functools.partial(dpo_loss, beta=BETA), "ipo": functools.partial(ipo_loss, tau=BETA)}


def cases(vectors):
    names = [key.removesuffix("/loss") for key in vectors if key.endswith("/loss")]
    return [(name, lambda name=name: (_nash if name == "nash" else _xpo)(vectors, name)) for name in names]


def _xpo(v, name):
    pair_loss = PAIR_LOSSES.get(name.removeprefix("xpo_"))
    if pair_loss is None:
        raise NoFunction(name)
    own = jnp.asarray((v["model_model"] - v["ref_model"]).sum(1))
    other = jnp.asarray((v["model_ref"] - v["ref_ref"]).sum(1))
    won = jnp.asarray(v["chosen_mask"])
    pairs = pair_loss(jnp.where(won, own, other), jnp.where(won, other, own))
    bonus = optimism(jnp.asarray(v["model_ref"].sum(1)), alpha=ALPHA)
    yield Comparison("pair losses", pairs, v[f"{name}/dpo_losses"], atol=1e-6)
    yield Comparison("bonus", bonus, v[f"{name}/xpo_losses"], atol=1e-6)
    yield Comparison("loss", (pairs + bonus).mean(), v[f"{name}/loss"])


def _nash(v, name):
    ref, preference = jnp.asarray(v["ref_model"]), jnp.asarray(v["probability"])

    def f(logps):
        policy = preference_loss(logps.sum(1), preference)
        return (policy + token_kl_loss(logps, ref, jnp.ones(logps.shape, bool), tau=BETA)).mean(), -policy

    logps = jnp.asarray(v["model_model"])
    (loss, score), gradient = jax.value_and_grad(f, has_aux=True)(logps)
    yield Comparison("loss", loss, v[f"{name}/loss"])
    yield Comparison("score", score, v[f"{name}/score"], atol=1e-6)
    yield Comparison("KL", (logps - ref).sum(1), v[f"{name}/kl"], atol=1e-6)
    yield slope(gradient, v[f"{name}/grad"])
