"""What the objectives on rollouts share: the final score, the correction for another sampler, the metrics of a policy that moves away from
its samples. Everything here is for `prepare`, over the whole batch, but the metrics of the ratio."""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.objectives._reference import reference_logps
from rlhf_jax.ops import vocab
from rlhf_jax.ops.importance import CORRECTIONS
from rlhf_jax.ops.kl import ESTIMATORS, from_reference, k1, k3
from rlhf_jax.ops.masking import loss_tokens, masked_moments, masked_sum
from rlhf_jax.ops.policy_gradient import clipped_sides
from rlhf_jax.types import Array, Mean, Rollout, Tail

PLACES = ("reward", "loss")  # where a KL penalty may sit


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


def known_scores(batch: Rollout) -> tuple[Array, Array]:
    """The score of each completion, 0 where there is none, and whether there is one, [B] each.

    A completion that cannot be judged has the score NaN; it enters no baseline and is not trained on. (config.reward_failure
    says whether a reward that fails ends in NaN here, or in an error or another number before.)

    Args:
      batch: the rollout.

    Raises:
      UserError: the rollout was not scored.
    """
    chex.assert_rank([batch.seqs.tokens, batch.truncated], [2, 1])
    raw = raw_scores(batch)
    known = batch.real & ~jnp.isnan(raw)
    return jnp.where(known, raw, 0.0), known


def newest(batch: Rollout) -> Array:
    """The real rows that the newest weights of the batch drew, [B] bool: all of them without replay.

    What the policy says now is measured on these; earlier rows, which another policy drew, would drag the metrics and PPO's controller behind.
    (With rollouts ahead the first few have the same weights, and replayed rows among them count too.)

    Args:
      batch: the rollout.
    """
    chex.assert_equal_shape([batch.version, batch.truncated])
    versions = jnp.where(batch.real, batch.version, -1)
    return batch.real & (versions == versions.max())


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


def completion_scores(
    batch: Rollout, old_logps: Array, *, beta: float, kl_estimator: str, kl_in: str, missing_eos_penalty: float
) -> tuple[Array, Array, dict[str, Mean]]:
    """What a completion earned: its score, less the penalty for no stop token and, with kl_in = "reward", less β Σ_t k( π_old/π_ref ).

    Args:
      batch: the rollout.
      old_logps: [B, T] nats.
      beta: weight of the KL from the reference, ≥ 0; 0 needs no reference.
      kl_estimator: of the KL per token, k1, k2 or k3 (ops.kl). In the reward k1 is the unbiased one; in the loss its gradient is zero on average,
        so take k2 (the gradient of the KL itself) or k3 there.
      kl_in: where the KL sits, reward or loss.
      missing_eos_penalty: subtracted from a truncated row's score, ≥ 0; 0 = none.

    Returns:
      scores: [B], 0 where the reward gave none.
      known: [B] bool, the rows to which it gave one.
      metrics: of the rollout.
    """
    chex.assert_equal_shape([old_logps, batch.seqs.tokens])
    mask, fresh, (raw, known) = loss_tokens(batch.seqs), newest(batch), known_scores(batch)
    metrics = rollout_metrics(batch, raw_scores(batch))
    scores = penalised(raw, batch.truncated, missing_eos_penalty=missing_eos_penalty)
    if batch.seqs.ref_logps is not None:
        metrics |= kl_metrics(log_ratio(old_logps, batch.seqs.ref_logps, mask), mask, fresh)
    if beta and kl_in == "reward":
        log_ratios = log_ratio(old_logps, reference_logps(batch.seqs, "with config.objective.beta > 0"), mask)
        penalty = -beta * masked_sum(ESTIMATORS[kl_estimator](log_ratios), mask)
        scores = scores + penalty
        metrics["objective/non_score_reward"] = Mean.of(penalty, fresh)
        metrics["objective/rlhf_reward"] = Mean.of(scores, known & fresh)
    return jnp.where(known, scores, 0.0), known, metrics


def before_update(nets: Any, batch: Rollout, *more: Any) -> tuple[Array, Any, dict[str, Mean]]:
    """log π_old of the tokens, and what else is asked of the policy before the first update, in one pass.

    Args:
      nets: the networks.
      batch: the rollout; it may hold the log-probs already (config.sampling.old_logps = "sampler"), else the trainer reads them.
      more: as `want` of nets.policy.

    Returns:
      [B, T] nats; the policy's namespace, None where nothing had to be read; the metrics of `gap_metrics` where the trainer read them.
    """
    chex.assert_rank(batch.seqs.tokens, 2)
    if batch.old_logps is not None:
        return batch.old_logps, nets.policy(batch.seqs, want=more) if more else None, {}
    out = nets.policy(batch.seqs, want=(vocab.logps, *more))
    return out.logps, out, gap_metrics(batch, out.logps)


def without(batch: Rollout, rows: Array) -> Rollout:
    """The rollout with nothing to train on in some rows, as if they were not there.

    Args:
      batch: the rollout.
      rows: [B] bool.
    """
    chex.assert_equal_shape([rows, batch.truncated])
    return batch.replace(seqs=batch.seqs.replace(loss_mask=batch.seqs.loss_mask & ~rows[:, None]))


def trainable_rows(batch: Rollout, known: Array, *, mask_truncated: bool) -> Rollout:
    """The rollout with nothing to train on in rows without a score and, if asked for, in truncated ones.

    Args:
      batch: the rollout.
      known: [B] bool, the rows that have a score.
      mask_truncated: do not train on rows without a stop token; their scores still count in the baseline.
    """
    chex.assert_equal_shape([batch.truncated, known])
    return without(batch, ~known | batch.truncated if mask_truncated else ~known)


def with_advantages(
    batch: Rollout, old_logps: Array, advantages: Array, *, correction: str, correction_low: float, correction_high: float
) -> tuple[Rollout, dict[str, Mean]]:
    """The rollout as a loss takes it, the correction multiplied into the advantages: exact, since weights are ≥ 0 and losses are linear in A.

    Args:
      batch: the rollout.
      old_logps: [B, T] nats.
      advantages: [B, T] or, the same on all tokens of a row, [B, 1].
      correction: for a sampler that is not the trainer: none, or the weight old/sampler of each token or of the whole sequence, truncated to the
        bounds or masked (0) outside them: token_truncate, token_mask, sequence_truncate, sequence_mask.
      correction_low: lower bound of the correction, [0, 1]; 0 = none.
      correction_high: upper bound of the correction, ≥ 1; inf = none.

    Returns:
      The rollout, and the correction's metrics.
    """
    chex.assert_rank([old_logps, advantages], 2)
    mask = loss_tokens(batch.seqs)
    weights, metrics = corrections(old_logps, batch.sampler_logps, mask, correction=correction, correction_low=correction_low,
                                   correction_high=correction_high)
    return batch.replace(old_logps=old_logps, advantages=jnp.where(mask, advantages * weights, 0.0)), metrics


def corrections(
    old_logps: Array, sampler_logps: Array, mask: Array, *, correction: str, correction_low: float, correction_high: float
) -> tuple[Array, dict[str, Mean]]:
    """π_old/π_sampler of each token [B, T] or row [B, 1], bounded, and its metrics; none at all with "none".

    Args:
      old_logps: the trainer's, [B, T] nats.
      sampler_logps: of the distribution drawn from, filters included, [B, T] nats.
      mask: [B, T] bool.
      correction: for a sampler that is not the trainer: none, or the weight old/sampler of each token or of the whole sequence, truncated to the
        bounds or masked (0) outside them: token_truncate, token_mask, sequence_truncate, sequence_mask.
      correction_low: lower bound of the correction, [0, 1]; 0 = none.
      correction_high: upper bound of the correction, ≥ 1; inf = none.
    """
    chex.assert_rank([old_logps, sampler_logps, mask], 2)
    chex.assert_equal_shape([old_logps, sampler_logps, mask])
    weigh, log_ratios = CORRECTIONS[correction], log_ratio(old_logps, sampler_logps, mask)
    weights = weigh(log_ratios, mask, correction_low=correction_low, correction_high=correction_high)
    if correction == "none":
        return weights, {}
    everywhere = jnp.broadcast_to(weights, mask.shape)
    bounded = weights != weigh(log_ratios, mask, correction_low=0.0, correction_high=math.inf)
    return weights, {
        "policy/correction_mean": Mean.of(everywhere, mask),
        "policy/correction_max": Mean.of(jnp.where(mask, everywhere, 0.0).max()),
        "policy/correction_frac": Mean.of(jnp.broadcast_to(bounded, mask.shape), mask),
    }


def gap_metrics(batch: Rollout, old_logps: Array) -> dict[str, Mean]:
    """How far the sampler's reading of its tokens is from the trainer's at the same temperature: mean, 99th percentile and largest |difference|.

    Of samples of the weights that are trained it is rounding; of older ones it holds what the policy has moved since.

    Args:
      batch: the rollout; filters (top_p …) do not count where the sampler kept its unfiltered log-probs.
      old_logps: the trainer's, [B, T] nats.
    """
    chex.assert_equal_shape([old_logps, batch.sampler_logps])
    mask, drawn = loss_tokens(batch.seqs), batch.sampler_logps if batch.plain_logps is None else batch.plain_logps
    gap = jnp.abs(log_ratio(old_logps, drawn, mask))
    return {
        "rollout/logp_gap_mean": Mean.of(gap, mask),
        "rollout/logp_gap_p99": Mean.of(jnp.minimum(Tail.at(0.99, gap, mask).compute(), gap.max())),
        "rollout/logp_gap_max": Mean.of(gap.max()),
    }


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


def length_metrics(batch: Rollout) -> dict[str, Mean]:
    """The policy's own tokens per row, and the fraction of truncated rows, over the newest ones.

    Args:
      batch: the rollout.
    """
    chex.assert_rank(batch.truncated, 1)
    fresh = newest(batch)
    return {"rollout/length": Mean.of(loss_tokens(batch.seqs).sum(-1), fresh), "rollout/truncated": Mean.of(batch.truncated, fresh)}


def rollout_metrics(batch: Rollout, scores: Array) -> dict[str, Mean]:
    """Mean and standard deviation of the scores, the policy's own tokens per row, the fractions of truncated and of unscored rows; all of the newest.

    Args:
      batch: the rollout.
      scores: [B], as the reward gave them; NaN where it gave none.
    """
    chex.assert_equal_shape([scores, batch.truncated])
    fresh = newest(batch)
    known = fresh & ~jnp.isnan(scores)
    _, variance = masked_moments(scores, known)
    return {
        "objective/score": Mean.of(scores, known),
        "objective/score_std": Mean.of(jnp.sqrt(variance)),
        "rollout/unscored": Mean.of(~known, fresh),
    } | length_metrics(batch)


def sequence_kl(log_ratios: Array, mask: Array, real: Array) -> Mean:
    """KL(π ‖ ref) per sequence, Σ_t k1, averaged over the real rows, nats.

    Args:
      log_ratios: [B, T] log π − log ref of the sampled tokens.
      mask: [B, T] bool.
      real: [B] bool.
    """
    chex.assert_equal_shape([log_ratios, mask])
    return Mean.of(masked_sum(k1(log_ratios), mask), real)


def kl_metrics(log_ratios: Array, mask: Array, real: Array) -> dict[str, Mean]:
    """KL between policy and reference in both directions, from the policy's samples, mean over the real rows of Σ over tokens, nats.

    Args:
      log_ratios: [B, T] log π − log ref of the sampled tokens.
      mask: [B, T] bool.
      real: [B] bool.
    """
    chex.assert_equal_shape([log_ratios, mask])
    return {"objective/kl": sequence_kl(log_ratios, mask, real),
            "objective/kl_from_reference": Mean.of(masked_sum(from_reference(log_ratios), mask), real)}


def clip_metrics(below: Array, above: Array, mask: Array) -> dict[str, Mean]:
    """The fractions whose gradient a clip takes away: in all, because the ratio is too small, and because it is too large.

    Args:
      below, above: of each token [B, T], or of each row [B], bool.
      mask: same shape, bool.
    """
    chex.assert_equal_shape([below, above, mask])
    return {"policy/clip_frac": Mean.of(below | above, mask), "policy/clip_frac_low": Mean.of(below, mask),
            "policy/clip_frac_high": Mean.of(above, mask)}


def drift_metrics(log_ratios: Array, mask: Array) -> dict[str, Mean]:
    """How far the policy has moved from the one that sampled: KL(old ‖ new), and the distribution of the ratio over tokens.

    Args:
      log_ratios: [B, T] log π − log π_old, nats.
      mask: [B, T] bool.
    """
    chex.assert_rank([log_ratios, mask], 2)
    chex.assert_equal_shape([log_ratios, mask])
    return {
        "policy/approx_kl": Mean.of(k3(-log_ratios), mask),  # the samples are the old policy's
        "policy/ratio_p99": Tail.at(0.99, log_ratios, mask, exponential=True),
        "policy/ratio_max": Tail.at(1.0, log_ratios, mask, exponential=True),
    }


def ratio_metrics(
    log_ratios: Array, advantages: Array, mask: Array, *, clip_low: float, clip_high: float, dual_clip: float = math.inf
) -> dict[str, Mean]:
    """`drift_metrics`, and the fraction of tokens whose gradient the clip takes away.

    Args:
      log_ratios: [B, T] log π − log π_old, nats.
      advantages: [B, T].
      mask: [B, T] bool.
      clip_low: how far a ratio may fall below 1, [0, 1].
      clip_high: how far a ratio may rise above 1, ≥ 0.
      dual_clip: largest ratio that counts where the advantage is negative, ≥ 1; inf = off.
    """
    chex.assert_rank([log_ratios, advantages, mask], 2)
    chex.assert_equal_shape([log_ratios, advantages, mask])
    sides = clipped_sides(log_ratios, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return clip_metrics(*sides, mask) | drift_metrics(log_ratios, mask)
