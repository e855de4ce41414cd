"""What the policy-gradient objectives without a critic share at the loss: the policy read on a prepared rollout, the KL penalty, the entropy bonus.

An objective's `loss` is then its surrogate of `Evaluation.log_ratios` and `.advantages`, and one line for what it is averaged over; those whose
surrogate is PPO's are that line alone: `loss = clipped_loss(token_means)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import jax.numpy as jnp
from flax import struct

from rlhf_jax.objectives._reference import reference_logps
from rlhf_jax.objectives._rollouts import PLACES, clip_metrics, drift_metrics, filled, log_ratio
from rlhf_jax.ops import vocab
from rlhf_jax.ops.importance import CORRECTIONS, LEVELS, on_policy
from rlhf_jax.ops.kl import ESTIMATORS, exp_ratio
from rlhf_jax.ops.masking import loss_tokens, masked_mean, masked_sum
from rlhf_jax.ops.policy_gradient import clipped_sides, clipped_surrogate
from rlhf_jax.types import Array, Mean, Rollout

DEFAULTS: dict[str, Any] = {  # what is off by default in every objective that takes it
    "unbiased_kl": False, "entropy_coef": 0.0, "off_policy_kl": math.inf, "correction": "none", "correction_low": 0.0, "correction_high": 3.0,
}
RANGES = {
    "beta": (0.0, math.inf), "entropy_coef": (0.0, math.inf), "off_policy_kl": (0.0, math.inf), "correction_low": (0.0, 1.0),
    "correction_high": (1.0, math.inf), "missing_eos_penalty": (0.0, math.inf), "kl_estimator": ESTIMATORS, "kl_in": PLACES,
    "correction": CORRECTIONS,
}
CLIP_RANGES = {"clip_low": (0.0, 1.0), "clip_high": (0.0, math.inf), "dual_clip": (1.0, math.inf)}


@struct.dataclass
class Evaluation:
    """The policy in training, read on a rollout that was prepared."""

    seqs: Any  # the rollout's Sequences
    mask: Array  # [B, T] bool, the tokens that are trained on
    rows: Array  # [B] bool, the rows that have any
    logps: Array  # [B, T] nats
    entropy: Array  # [B, T] nats
    token_log_ratios: Array  # [B, T] nats, log π/π_old, 0 outside the mask
    log_ratios: Array  # [B, T] nats, the same at the level of the objective's ratio
    advantages: Array  # [B, T], 0 where a row was left out as off-policy
    left_out: Array | None  # [B, T] bool, those rows; None: none ever is

    def metrics(self) -> dict[str, Mean]:
        """Entropy, how far the tokens' ratios have moved, and what was left out as off-policy."""
        found = {"objective/entropy": Mean.of(self.entropy, self.mask)} | drift_metrics(self.token_log_ratios, self.mask)
        if self.left_out is not None:
            found["policy/off_policy_frac"] = Mean.of(self.left_out, self.mask)
        return found


def evaluate(nets: Any, batch: Rollout, keys: Array | None, *, ratio_level: str, off_policy_kl: float) -> Evaluation:
    """Runs the policy on a prepared rollout.

    Args:
      nets: the networks.
      batch: from `prepare`.
      keys: [B] or None.
      ratio_level: of the ratio π/π_old: token; sequence, the geometric mean over the row; or sequence_token, that value with the token's gradient.
      off_policy_kl: nats per token of KL(sampler ‖ π) above which a row with a negative advantage gives no policy gradient, ≥ 0; inf = off. The
        sampler's filters (top_k, top_p) count as distance.
    """
    chex.assert_equal_shape([batch.seqs.tokens, batch.sampler_logps])
    mask = loss_tokens(batch.seqs)
    out = nets.policy(batch.seqs, keys, want=(vocab.logps, vocab.entropy))
    old_logps, advantages = filled(batch, "old_logps", "advantages")
    log_ratios = log_ratio(out.logps, old_logps, mask)
    left_out = None
    if math.isfinite(off_policy_kl):
        left_out = ~on_policy(advantages, log_ratio(out.logps, batch.sampler_logps, mask), mask, off_policy_kl=off_policy_kl)
        advantages = jnp.where(left_out, 0.0, advantages)
    return Evaluation(seqs=batch.seqs, mask=mask, rows=mask.any(-1), logps=out.logps, entropy=out.entropy, token_log_ratios=log_ratios,
                      log_ratios=LEVELS[ratio_level](log_ratios, mask), advantages=advantages, left_out=left_out)


def kl_loss(ref_log_ratios: Array, log_ratios: Array, *, beta: float, kl_estimator: str, unbiased_kl: bool) -> Array:
    """Unreduced β · k( π/π_ref ), times ρ = π/π_old if unbiased_kl, [B, T].

    Args:
      ref_log_ratios: log π − log π_ref, [B, T] nats.
      log_ratios: log ρ, [B, T] nats.
      beta: weight of the KL from the reference, ≥ 0; 0 needs no reference.
      kl_estimator: of the KL per token, k1, k2 or k3 (ops.kl). In the reward k1 is the unbiased one; in the loss its gradient is zero on average,
        so take k2 (the gradient of the KL itself) or k3 there.
      unbiased_kl: weigh the KL in the loss by π/π_old of the token, through which the gradient goes too: with k1 and k3 value and gradient are
        then those of KL(π ‖ ref) also on samples of an older policy.

    See: Shao et al. 2024, eq. 4; the weight: DeepSeek-AI 2025, DeepSeek-V3.2 (arXiv:2512.02556), eq. 7.
    """
    chex.assert_rank([ref_log_ratios, log_ratios], 2)
    chex.assert_equal_shape([ref_log_ratios, log_ratios])
    kl = ESTIMATORS[kl_estimator](ref_log_ratios)
    if not unbiased_kl:
        return beta * kl
    # The estimators saturate at e⁶⁰ and the ratio at e²⁷, so that their product stays finite in float32.
    return beta * exp_ratio(jnp.minimum(log_ratios, 27.0)) * kl


def penalties(
    now: Evaluation, average: Callable[[Array, Evaluation], Mean], *, beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool,
    entropy_coef: float,
) -> dict[str, Mean]:
    """The loss terms beside the surrogate, where they are on: the KL from the reference, and the entropy bonus −entropy_coef · H per token.

    Args:
      now: from `evaluate`.
      average: what the objective averages over: a loss per token [B, T] to a Mean.
      beta: weight of the KL from the reference, ≥ 0; 0 needs no reference.
      kl_estimator: of the KL per token, k1, k2 or k3 (ops.kl). In the reward k1 is the unbiased one; in the loss its gradient is zero on average,
        so take k2 (the gradient of the KL itself) or k3 there.
      kl_in: where the KL sits: in the reward of the completion, or in the loss of each token.
      unbiased_kl: weigh the KL in the loss by π/π_old, which makes it unbiased on samples of an older policy (DeepSeek-V3.2).
      entropy_coef: weight of the entropy bonus, a mean over tokens, ≥ 0; 0 = off.
    """
    chex.assert_equal_shape([now.mask, now.log_ratios, now.entropy])
    terms = {}
    if beta and kl_in == "loss":
        ref_log_ratios = log_ratio(now.logps, reference_logps(now.seqs, "with config.objective.beta > 0"), now.mask)
        terms["kl"] = average(kl_loss(ref_log_ratios, now.token_log_ratios, beta=beta, kl_estimator=kl_estimator, unbiased_kl=unbiased_kl), now)
    if entropy_coef:
        terms["entropy"] = Mean.of(-entropy_coef * now.entropy, now.mask)
    return terms


def sequence_means(x: Array, now: Evaluation) -> Mean:
    """1/G Σ_i 1/|o_i| Σ_t: the mean over rows of each row's mean over its tokens.

    Args:
      x: [B, T].
      now: from `evaluate`.
    """
    chex.assert_equal_shape([x, now.mask])
    return Mean.of(masked_mean(x, now.mask), now.rows)


def token_means(x: Array, now: Evaluation) -> Mean:
    """1/Σ_i |o_i| Σ_i Σ_t: the mean over the tokens of all rows, a long row weighing more.

    Args:
      x: [B, T].
      now: from `evaluate`.
    """
    chex.assert_equal_shape([x, now.mask])
    return Mean.of(x, now.mask)


def sequence_sums(x: Array, now: Evaluation) -> Mean:
    """1/G Σ_i Σ_t: the mean over rows of each row's sum over its tokens.

    Args:
      x: [B, T].
      now: from `evaluate`.
    """
    chex.assert_equal_shape([x, now.mask])
    return Mean.of(masked_sum(x, now.mask), now.rows)


def clipped_loss(average: Callable[[Array, Evaluation], Mean]) -> Callable[..., tuple[dict[str, Mean], dict[str, Mean]]]:
    """The `loss` of the objectives on PPO's clipped surrogate, which differ in what it is averaged over.

    Args:
      average: a loss per token [B, T] to a Mean: `sequence_means`, `token_means`, `sequence_sums` or another.
    """

    def loss(
        nets: Any, batch: Rollout, keys: Array | None, *, clip_low: float, clip_high: float, dual_clip: float, ratio_level: str,
        off_policy_kl: float, beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool, entropy_coef: float,
    ) -> tuple[dict[str, Mean], dict[str, Mean]]:
        now = evaluate(nets, batch, keys, ratio_level=ratio_level, off_policy_kl=off_policy_kl)
        surrogate = clipped_surrogate(now.log_ratios, now.advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
        sides = clipped_sides(now.log_ratios, now.advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
        terms = {"policy": average(surrogate, now)} | penalties(
            now, average, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
        return terms, now.metrics() | clip_metrics(*sides, now.mask)

    return loss
