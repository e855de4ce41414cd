"""PPO for RLHF: an actor and a critic on the score of the response less a per-token KL penalty.

    r_t = −c · k( π_old(y_t)/π_ref(y_t) )  +  [t is the last token] · score
    A, R = GAE(r, V_old; γ, λ),  A whitened;      c ← c · (1 + clip(KL / kl_target − 1, ±0.2) · n / kl_horizon)
    L = −min( ρ A, clip(ρ, 1 ± clip) A )  +  value_coef · ½ max( (V − R)², (V_clipped − R)² )  −  entropy_coef · H

Use: the reference algorithm of online RLHF: a critic pays where rewards are dense or responses long, at the price of a second network.
See: Ziegler et al. 2019 (arXiv:1909.08593), eq. 2 and section 2.2; Stiennon et al. 2020 (arXiv:2009.01325); Ouyang et al. 2022
(arXiv:2203.02155); Huang et al. 2024, "The N+ implementation details of RLHF with PPO" (arXiv:2403.17031).
Deviation: the maths runs in `prepare`, over the whole rollout and with the carried coefficient c, and `loss` sees data only; means are over
tokens; the score sits on the last response token, not one behind it; tokens that the policy did not write are stepped over;
kl_horizon = inf keeps the coefficient fixed, and kl_coef = 0 needs no reference; k1 = log π_old/π_ref is the papers', k3 an option. Options off
by default: dual clipping, and a correction for a sampler that is not the trainer, which multiplies A.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.objectives._reference import reference_logps
from rlhf_jax.objectives._rollouts import (
    before_update,
    corrections,
    filled,
    kl_metrics,
    known_scores,
    log_ratio,
    newest,
    penalised,
    ratio_metrics,
    raw_scores,
    rollout_metrics,
    sequence_kl,
    trainable_rows,
)
from rlhf_jax.ops import vocab
from rlhf_jax.ops.advantages import gae
from rlhf_jax.ops.importance import CORRECTIONS
from rlhf_jax.ops.kl import ESTIMATORS
from rlhf_jax.ops.masking import loss_tokens, masked_moments, masked_sum, place_at_last, whiten
from rlhf_jax.ops.policy_gradient import clipped_surrogate, clipped_value_loss, value_is_clipped
from rlhf_jax.types import Array, Mean, PyTree, Rollout

NEEDS = {"reference": "kl_coef", "critic": "", "reward": ""}
DEFAULTS = {
    "kl_coef": 0.05, "kl_target": 6.0, "kl_horizon": math.inf, "kl_estimator": "k1", "gamma": 1.0, "lam": 0.95, "clip": 0.2,
    "dual_clip": math.inf, "value_clip": 0.2, "value_coef": 0.1, "entropy_coef": 0.0, "missing_eos_penalty": 1.0, "reward_scale": 1.0,
    "reward_clip": math.inf, "whiten_rewards": False, "correction": "none", "correction_low": 0.0, "correction_high": 3.0,
}
RANGES = {
    "kl_coef": (0.0, math.inf), "kl_target": (1e-9, math.inf), "kl_horizon": (1e-9, math.inf), "gamma": (0.0, 1.0), "lam": (0.0, 1.0),
    "clip": (0.0, 1.0), "dual_clip": (1.0, math.inf), "value_clip": (1e-9, math.inf), "value_coef": (0.0, math.inf), "entropy_coef": (0.0, math.inf),
    "missing_eos_penalty": (0.0, math.inf), "reward_scale": (1e-9, math.inf), "reward_clip": (1e-9, math.inf), "correction_low": (0.0, 1.0),
    "correction_high": (1.0, math.inf), "kl_estimator": ESTIMATORS, "correction": CORRECTIONS,
}

MOST = 0.2  # of the controller: how far a KL counts as off its target, as a share of it


def shaped_scores(scores: Array, *, reward_scale: float, reward_clip: float) -> Array:
    """clip(reward_scale · score, ±reward_clip), [B].

    Args:
      scores: [B].
      reward_scale: scores are multiplied by it, > 0; 1 = off.
      reward_clip: then clipped to ± this, before any penalty, > 0; inf = off.
    """
    chex.assert_rank(scores, 1)
    return jnp.clip(reward_scale * scores, -reward_clip, reward_clip)


def token_rewards(scores: Array, log_ratios: Array, mask: Array, kl_coef: Array, *, kl_estimator: str) -> Array:
    """−kl_coef · k on every token of the response, plus the score on its last one, [B, T].

    Args:
      scores: [B].
      log_ratios: log π_old − log π_ref, [B, T] nats.
      mask: [B, T] bool, the policy's own tokens.
      kl_coef: [].
      kl_estimator: of the KL per token, k1, k2 or k3 (ops.kl).

    See: Ziegler et al. 2019, eq. 2.
    """
    chex.assert_rank([scores, log_ratios, mask, kl_coef], [1, 2, 2, 0])
    chex.assert_equal_shape([log_ratios, mask])
    kl = ESTIMATORS[kl_estimator](log_ratios)
    return jnp.where(mask, -kl_coef * kl, 0.0) + place_at_last(scores, mask)


def updated_kl_coef(kl_coef: Array, kl: Array, sequences: Array, *, kl_target: float, kl_horizon: float) -> Array:
    """The adaptive controller's next coefficient: c · (1 + clip(KL / kl_target − 1, ±0.2) · n / kl_horizon), [].

    Args:
      kl_coef: c, [].
      kl: mean KL per sequence of this rollout, [] nats.
      sequences: n, [], the rows of it.
      kl_target: nats per sequence, > 0.
      kl_horizon: sequences, > 0.2 n, or c would reach 0; inf keeps c as it is.

    See: Ziegler et al. 2019, section 2.2, with K_β = n / kl_horizon as in its code.
    """
    chex.assert_rank([kl_coef, kl, sequences], 0)
    if math.isinf(kl_horizon):
        return kl_coef
    return kl_coef * (1.0 + jnp.clip(kl / kl_target - 1.0, -MOST, MOST) * sequences / kl_horizon)


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """1 − Var[R − V] / Var[R] over the mask, []; 1 is a perfect critic, 0 no better than a constant, 0 too where R is constant.

    Args:
      values: V, [B, T].
      returns: R, [B, T].
      mask: [B, T] bool.
    """
    chex.assert_equal_shape([values, returns, mask])
    _, variance = masked_moments(returns, mask)
    _, residual = masked_moments(returns - values, mask)
    return jnp.where(variance > 0, 1.0 - residual / jnp.where(variance > 0, variance, 1.0), 0.0)


def init_carry(nets: Any, *, kl_coef: float) -> PyTree:
    """The controller's first coefficient.

    Args:
      nets: unused.
      kl_coef: weight of the KL penalty in the reward, at the start, reward per nat, ≥ 0; 0 needs no reference.
    """
    return {"kl_coef": jnp.float32(kl_coef)}


def prepare(
    nets: Any, batch: Rollout, carry: PyTree, key: Array, *, kl_coef: float, kl_target: float, kl_horizon: float, kl_estimator: str,
    gamma: float, lam: float, missing_eos_penalty: float, reward_scale: float, reward_clip: float, whiten_rewards: bool, correction: str,
    correction_low: float, correction_high: float,
) -> tuple[Rollout, PyTree, dict[str, Mean]]:
    """Old log-probs, values, rewards, advantages and returns. The other hyper-parameters are those of the functions above and of GAE.

    Args:
      nets: the networks.
      batch: the rollout.
      carry: the coefficient of the KL penalty.
      key: unused.
      whiten_rewards: divide the rewards per token by their deviation over the batch, their mean kept.

    Raises:
      UserError: kl_horizon is so short that the batch could take the coefficient to 0 or below.
    """
    chex.assert_rank([batch.seqs.tokens, batch.truncated], [2, 1])
    if kl_horizon <= MOST * (rows := batch.truncated.shape[0]):
        raise UserError(f"config.objective.kl_horizon = {kl_horizon:g}: a batch of {rows} rows could take the coefficient of the KL penalty to 0 or "
                        f"below; choose more than {MOST * rows:g} sequences")
    raw, known = known_scores(batch)
    fresh = known & newest(batch)
    metrics = rollout_metrics(batch, raw_scores(batch))
    batch = trainable_rows(batch, known, mask_truncated=False)
    mask = loss_tokens(batch.seqs)
    old_logps, out, gap = before_update(nets, batch, "values")  # actor and critic in one pass
    ref_logps = reference_logps(batch.seqs, "ppo") if kl_coef else batch.seqs.ref_logps
    ratios = log_ratio(old_logps, old_logps if ref_logps is None else ref_logps, mask)
    kl = sequence_kl(ratios, mask, fresh)
    if ref_logps is not None:
        metrics |= kl_metrics(ratios, mask, fresh)

    scores = shaped_scores(raw, reward_scale=reward_scale, reward_clip=reward_clip)
    scores = penalised(scores, batch.truncated, missing_eos_penalty=missing_eos_penalty)
    rewards = token_rewards(scores, ratios, mask, carry["kl_coef"], kl_estimator=kl_estimator)
    total = masked_sum(rewards, mask)
    metrics |= {
        "objective/kl_coef": Mean.of(carry["kl_coef"]),
        "objective/non_score_reward": Mean.of(jnp.where(mask.any(-1), total - scores, 0.0), fresh),
        "objective/rlhf_reward": Mean.of(total, fresh),
    }
    if whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    advantages, returns = gae(rewards, out.values, mask, gamma=gamma, lam=lam)
    metrics["value/explained_variance"] = Mean.of(explained_variance(out.values, returns, mask))
    weights, corrected = corrections(old_logps, batch.sampler_logps, mask, correction=correction, correction_low=correction_low,
                                     correction_high=correction_high)
    batch = batch.replace(old_logps=old_logps, values=out.values, rewards=rewards, returns=returns,
                          advantages=weights * whiten(advantages, mask, keep_mean=False))
    kl_coef_next = updated_kl_coef(carry["kl_coef"], kl.compute(), kl.count, kl_target=kl_target, kl_horizon=kl_horizon)
    return batch, {"kl_coef": kl_coef_next}, metrics | gap | corrected


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, clip: float, dual_clip: float, value_clip: float, value_coef: float, entropy_coef: float
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """The three terms, means over tokens.

    Args:
      nets: the networks.
      batch: from `prepare`.
      keys: [B] or None.
      clip: how far the policy's ratio may leave 1, [0, 1].
      dual_clip: largest ratio that counts where the advantage is negative, ≥ 1; 3 is usual, inf = off.
      value_clip: how far a value may move from the old one before its loss goes flat, > 0, in units of the reward; inf = off.
      value_coef: weight of the value loss, ≥ 0.
      entropy_coef: weight of the entropy bonus, ≥ 0; 0 = off.
    """
    mask = loss_tokens(batch.seqs)
    out = nets.policy(batch.seqs, keys, want=(vocab.logps, vocab.entropy, "values"))
    old_logps, old_values, advantages, returns = filled(batch, "old_logps", "values", "advantages", "returns")
    ratios = log_ratio(out.logps, old_logps, mask)
    policy = clipped_surrogate(ratios, advantages, clip_low=clip, clip_high=clip, dual_clip=dual_clip)
    value = clipped_value_loss(out.values, old_values, returns, clip=value_clip)
    terms = {"policy": Mean.of(policy, mask), "value": Mean.of(value_coef * value, mask)}
    if entropy_coef:
        terms["entropy"] = Mean.of(-entropy_coef * out.entropy, mask)
    metrics = ratio_metrics(ratios, advantages, mask, clip_low=clip, clip_high=clip, dual_clip=dual_clip)
    metrics |= {
        "value/clip_frac": Mean.of(value_is_clipped(out.values, old_values, returns, clip=value_clip), mask),
        "objective/entropy": Mean.of(out.entropy, mask),
    }
    return terms, metrics
