"""GRPO: a policy gradient whose baseline is the mean score of the other samples of the same prompt.

    L = −1/G Σ_i 1/|o_i| Σ_t [ min( ρ_t A_i, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_i )  −  β k3_t ],   ρ_t = π/π_old
    A_i = (r_i − mean(r)) / (std(r) + eps)   over the G samples of one prompt

Use: online RL with verifiable or model rewards and no critic; many samples of one prompt are cheap.
See: Shao et al. 2024, DeepSeekMath, eq. 3 and 4 (arXiv:2402.03300).
Deviation: std is the unbiased one, as in every public
implementation; clip bounds may differ (DAPO, arXiv:2503.14476, eq. 10); a group whose scores are all the same has A = 0 exactly.
β = 0 needs no reference.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives._reference import reference_logps
from rlhf_jax.objectives._rollouts import filled, log_ratio, penalised, ratio_metrics, raw_scores, rollout_metrics, sequence_kl
from rlhf_jax.ops import vocab
from rlhf_jax.ops.advantages import group_advantages, group_statistics
from rlhf_jax.ops.kl import k3
from rlhf_jax.ops.masking import loss_tokens, masked_mean
from rlhf_jax.ops.policy_gradient import clipped_surrogate
from rlhf_jax.types import Array, Mean, PyTree, Rollout

NEEDS = {"reference": "beta", "reward": "", "group": ""}
DEFAULTS = {"beta": 0.04, "clip_low": 0.2, "clip_high": 0.2, "advantage_eps": 1e-4, "missing_eos_penalty": 1.0}
RANGES = {
    "beta": (0.0, math.inf), "clip_low": (0.0, 1.0), "clip_high": (0.0, math.inf), "advantage_eps": (0.0, math.inf),
    "missing_eos_penalty": (0.0, math.inf),
}


def grpo_loss(log_ratios: Array, advantages: Array, mask: Array, *, clip_low: float, clip_high: float) -> Array:
    """Unreduced loss of each sequence: the clipped surrogate averaged over its own tokens, [B].

    Args:
      log_ratios: log π − log π_old, [B, T] nats.
      advantages: [B, T], held fixed.
      mask: [B, T] bool, the policy's own tokens.
      clip_low: how far a ratio may fall below 1, [0, 1).
      clip_high: how far a ratio may rise above 1, ≥ 0.

    See: Shao et al. 2024, eq. 3.
    """
    chex.assert_rank([log_ratios, advantages, mask], 2)
    chex.assert_equal_shape([log_ratios, advantages, mask])
    return masked_mean(clipped_surrogate(log_ratios, advantages, clip_low=clip_low, clip_high=clip_high), mask)


def kl_penalty(ref_log_ratios: Array, mask: Array, *, beta: float) -> Array:
    """Unreduced β · k3 of each sequence, averaged over its own tokens, [B] nats.

    Args:
      ref_log_ratios: log π − log π_ref, [B, T] nats.
      mask: [B, T] bool.
      beta: coefficient, ≥ 0.

    See: Shao et al. 2024, eq. 4.
    """
    chex.assert_rank([ref_log_ratios, mask], 2)
    chex.assert_equal_shape([ref_log_ratios, mask])
    return beta * masked_mean(k3(ref_log_ratios), mask)


def prepare(
    nets: Any, batch: Rollout, carry: PyTree, key: Array, *, missing_eos_penalty: float, advantage_eps: float
) -> tuple[Rollout, PyTree, dict[str, Mean]]:
    mask = loss_tokens(batch.seqs)
    raw = raw_scores(batch)
    scores = penalised(raw, batch.truncated, missing_eos_penalty=missing_eos_penalty)
    advantages = group_advantages(scores, batch.group_ids, batch.real, eps=advantage_eps)
    old_logps = nets.policy(batch.seqs).logps
    groups = group_statistics(scores, batch.group_ids, batch.real)
    metrics = rollout_metrics(batch, raw)
    metrics["rollout/zero_variance_groups"] = Mean.of(groups.constant, groups.count > 0)
    if batch.seqs.ref_logps is not None:
        metrics["objective/kl"] = sequence_kl(log_ratio(old_logps, batch.seqs.ref_logps, mask), mask, batch.real)
    return batch.replace(old_logps=old_logps, advantages=jnp.where(mask, advantages[:, None], 0.0)), carry, metrics


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, beta: float, clip_low: float, clip_high: float
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    mask = loss_tokens(batch.seqs)
    out = nets.policy(batch.seqs, keys, want=(vocab.logps, vocab.entropy))
    old_logps, advantages = filled(batch, "old_logps", "advantages")
    ratios = log_ratio(out.logps, old_logps, mask)
    terms = {"policy": Mean.of(grpo_loss(ratios, advantages, mask, clip_low=clip_low, clip_high=clip_high), batch.real)}
    if beta:
        ref_ratios = log_ratio(out.logps, reference_logps(batch.seqs, "grpo"), mask)
        terms["kl"] = Mean.of(kl_penalty(ref_ratios, mask, beta=beta), batch.real)
    metrics = ratio_metrics(ratios, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    return terms, metrics | {"objective/entropy": Mean.of(out.entropy, mask)}
