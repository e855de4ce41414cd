"""What the objectives on rollouts share: the final score, and the metrics of a policy that moves away from its samples."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.ops.kl import exp_ratio, k1, k3
from rlhf_jax.ops.masking import loss_tokens, masked_moments, masked_sum
from rlhf_jax.ops.policy_gradient import surrogate_is_clipped
from rlhf_jax.types import Array, Mean, Rollout


def raw_scores(batch: Rollout) -> Array:
    """The score of each completion as the reward gave it, [B].

    Args:
      batch: the rollout.

    Raises:
      UserError: the rollout was not scored.
    """
    if batch.scores is None:
        raise UserError("this rollout has no scores: set config.reward_from (a reward model) or config.reward_fn (a function)")
    chex.assert_equal_shape([batch.scores, batch.truncated])
    return batch.scores


def penalised(scores: Array, truncated: Array, *, missing_eos_penalty: float) -> Array:
    """The score of each completion, less a penalty where the budget ran out before a stop token, [B].

    Args:
      scores: [B], one reward per completion.
      truncated: [B] bool.
      missing_eos_penalty: subtracted from a truncated row's score, ≥ 0; 0 = none.

    See: Huang et al. 2024, "The N+ implementation details of RLHF with PPO" (arXiv:2403.17031), the "EOS trick".
    Deviation: the penalty is subtracted, as in TRL; the paper's code replaces the score by −1.
    """
    chex.assert_rank([scores, truncated], 1)
    chex.assert_equal_shape([scores, truncated])
    return scores - missing_eos_penalty * truncated


def filled(batch: Rollout, *fields: str) -> tuple[Array, ...]:
    """Fields of a rollout that `prepare` fills in, in the order asked for.

    Args:
      batch: the rollout.
      fields: names of fields.

    Raises:
      AssertionError: a field is still None, so `prepare` was not called.
    """
    if missing := [name for name in fields if getattr(batch, name) is None]:
        raise AssertionError(f"this rollout lacks {', '.join(missing)}: call the objective's prepare before its loss")
    chex.assert_equal_shape([batch.seqs.tokens, *(getattr(batch, name) for name in fields)])
    return tuple(getattr(batch, name) for name in fields)


def log_ratio(logps: Array, fixed: Array, mask: Array) -> Array:
    """logps − fixed on the mask's tokens and 0 elsewhere, so that no exponential of an unused token overflows, [B, T] nats.

    Args:
      logps: [B, T] nats.
      fixed: [B, T] nats, of the old or the reference policy.
      mask: [B, T] bool.
    """
    chex.assert_rank([logps, fixed, mask], 2)
    chex.assert_equal_shape([logps, fixed, mask])
    return jnp.where(mask, logps - fixed, 0.0)


def rollout_metrics(batch: Rollout, scores: Array) -> dict[str, Mean]:
    """Mean and standard deviation of the scores, the policy's own tokens per row, and the fraction of truncated rows.

    Args:
      batch: the rollout.
      scores: [B], as the reward gave them.
    """
    chex.assert_equal_shape([scores, batch.truncated])
    _, variance = masked_moments(scores, batch.real)
    return {
        "objective/score": Mean.of(scores, batch.real),
        "objective/score_std": Mean.of(jnp.sqrt(variance)),
        "rollout/length": Mean.of(loss_tokens(batch.seqs).sum(-1), batch.real),
        "rollout/truncated": Mean.of(batch.truncated, batch.real),
    }


def sequence_kl(log_ratios: Array, mask: Array, real: Array) -> Mean:
    """KL(π ‖ ref) per sequence, Σ_t k1, averaged over the real rows, nats.

    Args:
      log_ratios: [B, T] log π − log ref of the sampled tokens.
      mask: [B, T] bool.
      real: [B] bool.
    """
    chex.assert_equal_shape([log_ratios, mask])
    return Mean.of(masked_sum(k1(log_ratios), mask), real)


def ratio_metrics(log_ratios: Array, advantages: Array, mask: Array, *, clip_low: float, clip_high: float) -> dict[str, Mean]:
    """How far the policy has moved from the one that sampled: clipped tokens, KL(old ‖ new), each row's largest ratio (its mean over rows).

    Args:
      log_ratios: [B, T] log π − log π_old, nats.
      advantages: [B, T].
      mask: [B, T] bool.
      clip_low: as in `clipped_surrogate`.
      clip_high: as in `clipped_surrogate`.
    """
    chex.assert_rank([log_ratios, advantages, mask], 2)
    chex.assert_equal_shape([log_ratios, advantages, mask])
    largest = jnp.where(mask, exp_ratio(log_ratios), 0.0).max(-1)
    return {
        "policy/clip_frac": Mean.of(surrogate_is_clipped(log_ratios, advantages, clip_low=clip_low, clip_high=clip_high), mask),
        "policy/approx_kl": Mean.of(k3(-log_ratios), mask),  # the samples are the old policy's
        "policy/ratio_max": Mean.of(largest, mask.any(-1)),
    }
