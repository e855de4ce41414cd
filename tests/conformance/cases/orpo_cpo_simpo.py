"""ORPO's odds ratio (β = 0.1) and CPO's losses, SimPO among them, on the log-probs of two responses; gradients are those of the mean.

CPO's names: `cpo_<sigmoid|hinge|ipo>[_ls<ε>]` with β = 0.1; `simpo[_b<β>][_g<γ>][_ls<ε>][_alpha<α>]`, with β = 2 and γ = 1. SimPO reads log-probs per
token, the others sums.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp

from rlhf_jax.objectives.cdpo import cdpo_loss
from rlhf_jax.objectives.hinge import hinge_loss
from rlhf_jax.objectives.ipo import ipo_loss
from rlhf_jax.objectives.orpo import odds_ratio_loss
from rlhf_jax.objectives.simpo import simpo_loss
from rlhf_jax.ops.divergences import alpha_score
from rlhf_jax.ops.odds import log_odds
from tests.conformance.runner import Comparison, NoFunction, slope

BETA = 0.1


def cases(vectors):
    names = [key.partition("/")[0] for key in vectors if "/losses" in key]
    return [(name, lambda name=name: (_orpo if name == "orpo" else _cpo)(vectors, name)) for name in names]


def _orpo(v, name):
    at = jnp.asarray(v["avg_chosen"]), jnp.asarray(v["avg_rejected"])
    losses = odds_ratio_loss(*at)
    yield Comparison("losses", -BETA * losses, v[f"{name}/losses(beta*logsig)"])
    yield Comparison("mean log σ", -losses.mean(), v[f"{name}/mean_log_sigmoid"])
    yield Comparison("mean log odds", (log_odds(at[0]) - log_odds(at[1])).mean(), v[f"{name}/mean_log_odds"])
    for key, x in zip(("chosen_rewards", "rejected_rewards"), at):
        yield Comparison(key, BETA * x, v[f"{name}/{key}"])
    for key, got in zip(("grad_c_of_-mean", "grad_r_of_-mean"), jax.grad(lambda c, r: BETA * odds_ratio_loss(c, r).mean(), (0, 1))(*at)):
        yield slope(got, v[f"{name}/{key}"])


def _cpo(v, name):
    given = {word: float(number) for word, number in re.findall(r"_(b|g|ls|alpha)(-?[\d.]+)", name)}
    kind = re.sub(r"_(b|g|ls|alpha)-?[\d.]+", "", name)
    epsilon, alpha = given.get("ls", 0.0), given.get("alpha", 0.0)
    beta = given.get("b", 2.0 if kind == "simpo" else BETA)
    rewards = functools.partial(alpha_score, alpha=alpha) if alpha else lambda logps: logps
    losses = {
        "cpo_sigmoid": functools.partial(cdpo_loss, beta=beta, epsilon=epsilon), "cpo_hinge": functools.partial(hinge_loss, beta=beta),
        "cpo_ipo": functools.partial(ipo_loss, tau=beta), "simpo": functools.partial(_simpo, beta=beta, gamma=given.get("g", 1.0), epsilon=epsilon),
    }
    if kind not in losses:
        raise NoFunction(name)
    at = [jnp.asarray(v[f"{'avg' if kind == 'simpo' else 'sum'}_{branch}"]) for branch in ("chosen", "rejected")]
    f = lambda chosen, rejected: losses[kind](rewards(chosen), rewards(rejected))  # noqa: E731
    yield Comparison("losses", f(*at), v[f"{name}/losses"], atol=1e-6)
    for key, x in zip(("chosen_rewards", "rejected_rewards"), at):
        yield Comparison(key, beta * rewards(x), v[f"{name}/{key}"], atol=1e-6)
    for key, got in zip(("grad_c_of_mean", "grad_r_of_mean"), jax.grad(lambda *x: f(*x).mean(), (0, 1))(*at)):
        yield slope(got, v[f"{name}/{key}"])


def _simpo(chosen, rejected, *, beta, gamma, epsilon):
    """SimPO, smoothed as TRL does: the flipped loss keeps the margin's sign."""
    as_labelled = simpo_loss(chosen, rejected, beta=beta, gamma=gamma)
    flipped = simpo_loss(rejected, chosen, beta=beta, gamma=-gamma)
    return (1.0 - epsilon) * as_labelled + epsilon * flipped
