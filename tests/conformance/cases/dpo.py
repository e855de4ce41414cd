"""The DPO family: `<loss>__<option><value>…`, β = 0.1 and no label smoothing unless the name says otherwise; the chosen rows come first.

TRL turns the summed log-ratios into scores (by the divergence), and a loss reads scores; its "ipo" and "sigmoid_norm" divide scores by the length.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from rlhf_jax.objectives.apo_down import apo_down_loss
from rlhf_jax.objectives.apo_zero import apo_zero_loss
from rlhf_jax.objectives.bco_pair import bco_pair_loss
from rlhf_jax.objectives.cdpo import cdpo_loss
from rlhf_jax.objectives.discopop import discopop_loss
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.objectives.exo import exo_loss
from rlhf_jax.objectives.hinge import hinge_loss
from rlhf_jax.objectives.ipo import ipo_loss
from rlhf_jax.objectives.ld_dpo import length_weights
from rlhf_jax.objectives.nca import nca_loss
from rlhf_jax.objectives.robust_dpo import robust_dpo_loss
from rlhf_jax.objectives.sft import nll_loss
from rlhf_jax.objectives.sppo import sppo_loss
from rlhf_jax.objectives.wpo import wpo_weights
from rlhf_jax.ops.divergences import alpha_score, forward_kl_score, jensen_shannon_score
from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.types import Mean
from tests.conformance.cases._maths import value_and_slope
from tests.conformance.runner import NoFunction, options

WORDS = ("beta", "ls", "f_forward_kl", "f_js_divergence", "f_alpha_divergence", "f_alpha_coef", "ld_alpha", "wpo", "sigmoid", "bcopair", "sft")


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("loss/")]


def _pairs(rows):
    """[2B, …], chosen rows first, as [B, 2, …]."""
    return jnp.stack(jnp.split(jnp.asarray(rows), 2), axis=1)


def _case(v, name):
    loss, given = options(name, WORDS)
    mask, ref = _pairs(v["completion_mask"][:, 1:] != 0), _pairs(v["ref_logps"])
    squares = _pairs(v["log_sum_sq_probs"]) if "wpo" in given else None
    f = lambda rows: _value(loss, given, _pairs(rows), ref, mask, squares)  # noqa: E731
    yield from value_and_slope(f, v["policy_logps"], v[f"loss/{name}"], v[f"grad/{name}"], v["completion_mask"][:, 1:] != 0)


def _value(loss, given, logps, ref, mask, squares):
    if loss == "mpo":
        parts = {"sigmoid": "sigmoid", "bcopair": "bco_pair", "sft": "sft"}
        rest = {key: value for key, value in given.items() if key not in parts}
        return sum(float(given[key]) * _value(part, rest, logps, ref, mask, squares) for key, part in parts.items() if key in given)
    if loss == "sft":
        return Mean.of(nll_loss(logps[:, 0]), mask[:, 0]).compute()
    weights = length_weights(mask, alpha=float(given["ld_alpha"])) if "ld_alpha" in given else jnp.ones(mask.shape)
    sums, ref_sums = masked_sum(weights * logps, mask), masked_sum(weights * ref, mask)
    losses = _losses(loss, given, sums, ref_sums, mask)
    if squares is not None:
        losses = losses * wpo_weights(logps, squares, mask, weight_max=math.inf)
    return losses.mean()


def _scores(given, ratios):
    """The divergence's scores; TRL's coefficient of the α-divergence is 1 − α."""
    if "f_forward_kl" in given:
        return forward_kl_score(ratios, alpha=1.0)
    if "f_js_divergence" in given:
        return jensen_shannon_score(ratios, alpha=1.0)
    if {"f_alpha_divergence", "f_alpha_coef"} & given.keys():
        return alpha_score(ratios, alpha=1.0 - float(given.get("f_alpha_coef", 0.5)))
    return ratios


def _losses(loss, given, sums, ref_sums, mask):
    """[B] losses of a name, on the sums of log-probs [B, 2]."""
    beta, epsilon = float(given.get("beta", 0.1)), float(given.get("ls", 0.0))
    scores = _scores(given, sums - ref_sums)
    smoothed = functools.partial(cdpo_loss, beta=beta, epsilon=epsilon)
    if loss == "aot":
        margin, ref_margin = sums[:, 0] - sums[:, 1], ref_sums[:, 0] - ref_sums[:, 1]
        return smoothed(_sorted(margin), _sorted(ref_margin))
    if loss == "aot_unpaired":
        return smoothed(_sorted(sums[:, 0] - ref_sums[:, 0]), _sorted(sums[:, 1] - ref_sums[:, 1]))
    if loss in ("ipo", "sigmoid_norm"):
        scores = scores / jnp.maximum(mask.sum(-1), 1)
    on_scores = {
        "sigmoid": functools.partial(dpo_loss, beta=beta), "sigmoid_norm": functools.partial(dpo_loss, beta=beta),
        "hinge": functools.partial(hinge_loss, beta=beta), "ipo": functools.partial(ipo_loss, tau=beta),
        "exo_pair": functools.partial(exo_loss, beta=beta, epsilon=epsilon), "nca_pair": functools.partial(nca_loss, beta=beta),
        "robust": functools.partial(robust_dpo_loss, beta=beta, epsilon=epsilon),
        "bco_pair": lambda chosen, rejected: bco_pair_loss(chosen, rejected, jnp.zeros(chosen.shape), beta=beta),
        "sppo_hard": functools.partial(sppo_loss, eta=1.0 / beta), "apo_zero": functools.partial(apo_zero_loss, beta=beta),
        "apo_down": functools.partial(apo_down_loss, beta=beta), "discopop": functools.partial(discopop_loss, beta=beta, tau=0.05),
    }
    if loss not in on_scores:
        raise NoFunction(loss)
    return on_scores[loss](scores[:, 0], scores[:, 1])


def _sorted(x):
    """In ascending order; the order itself is held fixed."""
    return x[jnp.argsort(jax.lax.stop_gradient(x))]
