"""RLOO: REINFORCE whose baseline for a sample is the mean return of the other samples of its prompt.

    L = −1/B Σ_i min( ρ_i A_i, clip(ρ_i, 1 − clip_low, 1 + clip_high) A_i ),   ρ = π(o)/π_old(o), the product over all tokens
    A_i = R_i − 1/(G − 1) Σ_{j ≠ i} R_j,   R = score − β Σ_t k( π_old(o_t)/π_ref(o_t) )

Use: RLHF with a few samples per prompt and no critic: an unbiased gradient with little to tune.
See: Ahmadian et al. 2024, "Back to basics" (arXiv:2402.14740).
Deviation: the paper's loss is −A log π(o), on fresh samples; the ratio has the same gradient there and stays unbiased after the first update of a
rollout. By default nothing is clipped; 0.2 is TRL's. Advantages that differ within a row (a correction per token) enter by their mean.
"""

from __future__ import annotations

import math
from typing import Any

import chex

from rlhf_jax.objectives import _groups, _policy
from rlhf_jax.objectives._policy import evaluate, penalties, sequence_sums
from rlhf_jax.objectives._rollouts import (
    before_update,
    clip_metrics,
    completion_scores,
    raw_scores,
    rollout_metrics,
    trainable_rows,
    with_advantages,
)
from rlhf_jax.objectives.ppo import shaped_scores
from rlhf_jax.ops.advantages import group_statistics, leave_one_out_advantages, standardised
from rlhf_jax.ops.masking import masked_mean, masked_sum
from rlhf_jax.ops.policy_gradient import clipped_sides, clipped_surrogate
from rlhf_jax.types import Array, Mean, PyTree, Rollout

NEEDS = _groups.NEEDS
DEFAULTS: dict[str, Any] = {
    "beta": 0.03, "kl_estimator": "k1", "kl_in": "reward", "reward_clip": math.inf, "normalise_advantages": False, "advantage_eps": 1e-4,
    "missing_eos_penalty": 0.0, "mask_truncated": False, "clip_low": 1.0, "clip_high": math.inf, "dual_clip": math.inf, **_policy.DEFAULTS,
}
RANGES = {**_policy.RANGES, **_policy.CLIP_RANGES, "reward_clip": (1e-9, math.inf), "advantage_eps": (0.0, math.inf)}


def rloo_advantages(returns: Array, group_ids: Array, known: Array, *, normalise_advantages: bool, advantage_eps: float) -> Array:
    """R_i − mean of the group's other returns, 0 where R is not known, [B].

    Args:
      returns: R, [B].
      group_ids: [B] int32, dense in [0, B).
      known: [B] bool.
      normalise_advantages: bring them to mean 0 and deviation 1 over the batch.
      advantage_eps: added to that deviation, ≥ 0, in units of the score.
    """
    chex.assert_equal_shape([returns, group_ids, known])
    advantages = leave_one_out_advantages(returns, group_ids, known)
    return standardised(advantages, known, eps=advantage_eps) if normalise_advantages else advantages


def rloo_loss(
    log_ratios: Array, advantages: Array, mask: Array, *, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[Array, tuple[Array, Array]]:
    """Unreduced loss of each row on its sequence's ratio, [B], and whether the clip takes its gradient away, below and above, [B] bool each.

    Args:
      log_ratios: log π − log π_old, [B, T] nats.
      advantages: [B, T], held fixed, the same on all tokens of a row.
      mask: [B, T] bool, the policy's own tokens.
      clip_low: how far the sequence's ratio may fall below 1, [0, 1]; 1 = no bound.
      clip_high: how far the sequence's ratio may rise above 1, ≥ 0; inf = no bound.
      dual_clip: largest ratio that counts where the advantage is negative, ≥ 1; inf = off.
    """
    chex.assert_rank([log_ratios, advantages, mask], 2)
    chex.assert_equal_shape([log_ratios, advantages, mask])
    log_ratio, advantage = masked_sum(log_ratios, mask), masked_mean(advantages, mask)
    return (clipped_surrogate(log_ratio, advantage, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip),
            clipped_sides(log_ratio, advantage, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip))


def prepare(
    nets: Any, batch: Rollout, carry: PyTree, key: Array, *, beta: float, kl_estimator: str, kl_in: str, reward_clip: float,
    normalise_advantages: bool, advantage_eps: float, missing_eos_penalty: float, mask_truncated: bool, correction: str, correction_low: float,
    correction_high: float,
) -> tuple[Rollout, PyTree, dict[str, Mean]]:
    chex.assert_rank([batch.seqs.tokens, batch.truncated], [2, 1])
    old_logps, _, gap = before_update(nets, batch)
    raw = raw_scores(batch)
    as_given = rollout_metrics(batch, raw)
    clipped = batch.replace(scores=shaped_scores(raw, reward_scale=1.0, reward_clip=reward_clip))
    returns, known, metrics = completion_scores(clipped, old_logps, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in,
                                                missing_eos_penalty=missing_eos_penalty)
    groups = group_statistics(returns, batch.group_ids, known)
    metrics["rollout/zero_variance_groups"] = Mean.of(groups.constant, groups.count > 0)
    advantages = rloo_advantages(returns, batch.group_ids, known, normalise_advantages=normalise_advantages, advantage_eps=advantage_eps)
    batch, corrected = with_advantages(
        trainable_rows(batch, known, mask_truncated=mask_truncated), old_logps, advantages[:, None], correction=correction,
        correction_low=correction_low, correction_high=correction_high)
    return batch, carry, metrics | gap | as_given | corrected


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, clip_low: float, clip_high: float, dual_clip: float, off_policy_kl: float,
    beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool, entropy_coef: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    now = evaluate(nets, batch, keys, ratio_level="token", off_policy_kl=off_policy_kl)
    policy, clipped = rloo_loss(now.log_ratios, now.advantages, now.mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    terms = {"policy": Mean.of(policy, now.rows)} | penalties(
        now, sequence_sums, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
    return terms, now.metrics() | clip_metrics(*clipped, now.rows)
