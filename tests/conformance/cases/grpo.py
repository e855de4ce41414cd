"""GRPO and its relatives: `<loss>__<option><value>…`. Defaults as in the vectors' README: ε = 0.2 (CISPO's cap 5), β = 0, ratios of tokens.

TRL builds one loss per token [B, T], multiplies masks and weights onto it, adds the KL, and divides as the loss type says; ours are the
functions that this puts together. TRL weighs the KL by the ratio unless "no_bias_corr" says otherwise, GMPO's apart.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from rlhf_jax.objectives._policy import kl_loss
from rlhf_jax.objectives.cispo import cispo_loss
from rlhf_jax.objectives.gmpo import gmpo_loss
from rlhf_jax.objectives.sapo import sapo_loss
from rlhf_jax.objectives.vespo import gamma_weights
from rlhf_jax.ops.importance import high_entropy, on_policy, sequence_level
from rlhf_jax.ops.masking import masked_mean, masked_sum
from rlhf_jax.ops.policy_gradient import clipped_surrogate
from tests.conformance.cases._maths import value_and_slope
from tests.conformance.runner import NoFunction, options

WORDS = ("beta", "seq", "no_bias_corr", "eps", "eps_low", "eps_high", "delta", "on_policy", "nitems", "ga", "spg", "top_entropy", "opsm",
         "entropy_coef", "token_adv", "vllm_is_ratio", "tool_mask")
MAX_COMPLETION_LENGTH = 16


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("loss/")]


def _case(v, name):
    loss, given = options(name, WORDS)
    arrays = {key: jnp.asarray(v[key]) for key in ("new_logps", "old_logps", "ref_logps", "entropies", "is_ratio", "mask")}
    mask = jnp.asarray(v["mask"] * v["tool_mask"] if "tool_mask" in given else v["mask"]) != 0
    advantages = jnp.broadcast_to(jnp.asarray(v["token_advantages"] if "token_adv" in given else v["advantages"][:, None]), mask.shape)
    f = lambda logps: _reduced(loss, given, _per_token(loss, given, logps, advantages, mask, arrays), mask, arrays)  # noqa: E731
    yield from value_and_slope(f, arrays["new_logps"], v[f"loss/{name}"], v[f"grad/{name}"])


def _number(given, word, otherwise):
    return float(given.get(word, otherwise))


def _surrogate(loss, given, logps, ratios, advantages, mask):
    """The policy's part per token, [B, T], of ratios at the level asked for."""
    level = sequence_level(ratios, mask) if "seq" in given else ratios
    eps = _number(given, "eps", 0.2)
    low, high = _number(given, "eps_low", eps), _number(given, "eps_high", eps)
    if loss == "cispo":
        return cispo_loss(logps, level, advantages, clip_low=1.0, clip_high=_number(given, "eps_high", 5.0) - 1.0)
    if loss == "sapo":
        return sapo_loss(level, advantages, temperature_pos=1.0, temperature_neg=1.05)
    if loss == "vespo":
        weights = jnp.broadcast_to(masked_sum(ratios, mask)[:, None], ratios.shape)
        return -gamma_weights(weights, advantages, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0) * advantages * logps
    if loss == "gmpo":
        return jnp.broadcast_to(gmpo_loss(ratios, advantages, mask, clip_low=low, clip_high=high)[:, None], ratios.shape)
    if loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        delta = _number(given, "delta", math.inf)  # TRL caps the ratio before either side of the minimum, whatever the advantage's sign
        kept = functools.partial(clipped_surrogate, clip_low=low, clip_high=high)
        capped = kept(jnp.minimum(level, math.log(delta)), advantages)
        return jnp.where(advantages > 0, capped, kept(level, advantages, dual_clip=max(delta, 1.0 + high)))
    raise NoFunction(loss)


def _per_token(loss, given, logps, advantages, mask, arrays):
    old = jax.lax.stop_gradient(logps) if "on_policy" in given else arrays["old_logps"]
    ratios = logps - old
    policy = _surrogate(loss, given, logps, ratios, advantages, mask)
    if "opsm" in given:
        policy = policy * on_policy(advantages, ratios, mask, off_policy_kl=_number(given, "opsm", 0))
    if "top_entropy" in given:
        policy = policy * high_entropy(arrays["entropies"], mask, entropy_quantile=1.0 - _number(given, "top_entropy", 1))
    if "vllm_is_ratio" in given:
        policy = policy * arrays["is_ratio"]
    level = sequence_level(ratios, mask) if "seq" in given else ratios
    unbiased = "no_bias_corr" not in given and loss != "gmpo"
    beta = _number(given, "beta", 0)
    return policy + (kl_loss(logps - arrays["ref_logps"], level, beta=beta, kl_estimator="k3", unbiased_kl=unbiased) if beta else 0.0)


def _reduced(loss, given, per_token, mask, arrays):
    """TRL's division, and its entropy bonus."""
    accumulation = _number(given, "ga", 1)
    # The tokens of a generation batch, which serves `spg` steps; an update takes `ga` of them.
    items = (_number(given, "nitems", 0) or arrays["mask"].sum()) * accumulation / _number(given, "spg", accumulation)
    if loss in ("grpo", "sapo", "gmpo"):
        value, tokens = masked_mean(per_token, mask).mean() / accumulation, mask.sum() * accumulation
    elif loss == "bnpo":
        value = jnp.where(mask, per_token, 0.0).sum() / mask.sum() / accumulation
        tokens = mask.sum() * accumulation
    elif loss == "dr_grpo":
        value = jnp.where(mask, per_token, 0.0).sum() / (len(mask) * MAX_COMPLETION_LENGTH) / accumulation
        tokens = mask.sum() * accumulation
    elif loss == "luspo":
        value, tokens = masked_sum(per_token, mask).mean() / accumulation, mask.sum() * accumulation
    else:
        value, tokens = jnp.where(mask, per_token, 0.0).sum() / items, items
    return value - _number(given, "entropy_coef", 0) * jnp.where(mask, arrays["entropies"], 0.0).sum() / tokens
