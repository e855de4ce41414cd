"""REINFORCE++: REINFORCE with PPO's clip and KL per token, its advantages whitened over the whole batch, and no critic.

    r_t = −β k( π_old(o_t)/π_ref(o_t) )  +  [t is the last token] · score,     A_t = Σ_{s ≥ t} γ^{s−t} r_s,  whitened over all tokens
    L = −1/Σ_i |o_i| Σ_i Σ_t min( ρ_t A_t, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_t ),   ρ_t = π/π_old

Use: RLHF on many different prompts with one sample each: as stable as PPO at the price of GRPO, and no group to overfit.
See: Hu et al. 2025 (arXiv:2501.03262).
Deviation: none. The paper's variant with a baseline is group_baseline = True, kl_in = "loss" and kl_estimator = "k2".
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives import _policy
from rlhf_jax.objectives._policy import clipped_loss, token_means
from rlhf_jax.objectives._reference import reference_logps
from rlhf_jax.objectives._rollouts import before_update, completion_scores, log_ratio, newest, trainable_rows, with_advantages
from rlhf_jax.objectives.ppo import token_rewards
from rlhf_jax.ops.advantages import gae, group_centred
from rlhf_jax.ops.masking import loss_tokens, masked_sum, whiten
from rlhf_jax.types import Array, Mean, PyTree, Rollout

NEEDS = {"reference": "beta", "reward": "", "group": "group_baseline"}
DEFAULTS: dict[str, Any] = {
    "beta": 0.01, "kl_estimator": "k1", "kl_in": "reward", "gamma": 1.0, "group_baseline": False, "missing_eos_penalty": 0.0,
    "mask_truncated": False, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": math.inf, **_policy.DEFAULTS,
}
RANGES = {**_policy.RANGES, **_policy.CLIP_RANGES, "gamma": (0.0, 1.0)}


def returns_to_go(rewards: Array, mask: Array, *, gamma: float) -> Array:
    """Σ_{s ≥ t} γ^{s−t} r_s over the policy's own tokens, zero elsewhere, [B, T].

    Args:
      rewards: [B, T].
      mask: [B, T] bool.
      gamma: discount per token, [0, 1].
    """
    chex.assert_rank([rewards, mask], 2)
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def baselined(scores: Array, group_ids: Array, known: Array, *, group_baseline: bool) -> Array:
    """The scores, less the mean of their group if asked for, [B].

    Args:
      scores: [B].
      group_ids: [B] int32, dense in [0, B).
      known: [B] bool.
      group_baseline: subtract the mean score of the prompt's samples before whitening.
    """
    chex.assert_equal_shape([scores, group_ids, known])
    return group_centred(scores, group_ids, known) if group_baseline else scores


def prepare(
    nets: Any, batch: Rollout, carry: PyTree, key: Array, *, beta: float, kl_estimator: str, kl_in: str, gamma: float, group_baseline: bool,
    missing_eos_penalty: float, mask_truncated: bool, correction: str, correction_low: float, correction_high: float,
) -> tuple[Rollout, PyTree, dict[str, Mean]]:
    mask = loss_tokens(batch.seqs)
    old_logps, _, gap = before_update(nets, batch)
    scores, known, metrics = completion_scores(batch, old_logps, beta=0.0, kl_estimator=kl_estimator, kl_in=kl_in,
                                               missing_eos_penalty=missing_eos_penalty)
    coef = beta if kl_in == "reward" else 0.0
    log_ratios = log_ratio(old_logps, reference_logps(batch.seqs, "reinforce_pp") if coef else old_logps, mask)

    def rewarded(scores: Array) -> Array:
        return token_rewards(scores, log_ratios, mask, jnp.float32(coef), kl_estimator=kl_estimator)

    metrics["objective/rlhf_reward"] = Mean.of(masked_sum(rewarded(scores), mask), known & newest(batch))  # before any baseline
    rewards = rewarded(baselined(scores, batch.group_ids, known, group_baseline=group_baseline))

    batch = trainable_rows(batch, known, mask_truncated=mask_truncated)
    counted = loss_tokens(batch.seqs)
    advantages = whiten(returns_to_go(rewards, mask, gamma=gamma), counted, keep_mean=False)
    batch, corrected = with_advantages(batch, old_logps, advantages, correction=correction, correction_low=correction_low,
                                       correction_high=correction_high)
    return batch, carry, metrics | gap | corrected


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, clip_low: float, clip_high: float, dual_clip: float, off_policy_kl: float,
    beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool, entropy_coef: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    chex.assert_equal_shape([batch.seqs.tokens, batch.sampler_logps])
    return clipped_loss(token_means)(
        nets, batch, keys, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, ratio_level="token", off_policy_kl=off_policy_kl,
        beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
