"""What the group-relative objectives share before the loss: the score of each of a prompt's samples against that of the others.

    A_i = (r_i − mean(r)) / (std + eps)   over the G samples of one prompt

GRPO's `prepare`, used as it is by its relatives, which differ in the surrogate and in what it is averaged over. All options are off in GRPO.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from rlhf_jax.objectives import _policy
from rlhf_jax.objectives._rollouts import before_update, completion_scores, known_scores, trainable_rows, with_advantages, without
from rlhf_jax.ops import vocab
from rlhf_jax.ops.advantages import SCALES, group_statistics
from rlhf_jax.ops.importance import LEVELS, high_entropy
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.ops.shaping import overlong_punishment
from rlhf_jax.types import Array, Mean, PyTree, Rollout

NEEDS = {"reference": "beta", "reward": "", "group": ""}
DEFAULTS: dict[str, Any] = {
    "beta": 0.0, "kl_estimator": "k3", "kl_in": "loss", "advantage_scale": "group", "advantage_eps": 1e-4, "missing_eos_penalty": 0.0,
    "overlong_length": 0, "overlong_buffer": 0, "mask_truncated": False, "filter_groups": False, "entropy_quantile": 0.0, **_policy.DEFAULTS,
}
CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": math.inf, "ratio_level": "token"}  # of those that clip
RANGES = {
    **_policy.RANGES, "advantage_eps": (0.0, math.inf), "overlong_length": (0, math.inf), "overlong_buffer": (0, math.inf),
    "entropy_quantile": (0.0, 1.0), "advantage_scale": SCALES,
}
CLIP_RANGES = {**_policy.CLIP_RANGES, "ratio_level": LEVELS}


def prepare(
    nets: Any, batch: Rollout, carry: PyTree, key: Array, *, beta: float, kl_estimator: str, kl_in: str, advantage_scale: str,
    advantage_eps: float, missing_eos_penalty: float, overlong_length: int, overlong_buffer: int, mask_truncated: bool, filter_groups: bool,
    entropy_quantile: float, correction: str, correction_low: float, correction_high: float,
) -> tuple[Rollout, PyTree, dict[str, Mean]]:
    """Old log-probs and advantages; the rollout's metrics.

    Args:
      nets: the networks.
      batch: the rollout.
      carry: passed on.
      key: unused.
      beta: weight of the KL from the reference, ≥ 0; 0 needs no reference.
      kl_estimator: of the KL per token, k1, k2 or k3 (ops.kl). In the reward k1 is the unbiased one; in the loss its gradient is zero on average,
        so take k2 (the gradient of the KL itself) or k3 there.
      kl_in: where the KL sits: in the reward of the completion, or in the loss of each token.
      advantage_scale: what advantages are divided by: the deviation of the group's scores, of the batch's, or none.
      advantage_eps: added to that deviation, ≥ 0, in units of the score.
      missing_eos_penalty: subtracted from a truncated row's score, ≥ 0; 0 = none.
      overlong_length: tokens at which DAPO's soft punishment of length reaches −1, as a rule sampling.max_new_tokens; 0 = no punishment.
      overlong_buffer: tokens over which that punishment sets in, ≥ 0; the paper's is a fifth of the length.
      mask_truncated: do not train on rows without a stop token; their scores still count in the baseline.
      filter_groups: do not train on groups whose scores, before any penalty, are all the same, nor count their tokens in a mean.
      entropy_quantile: tokens whose entropy is below this quantile of the batch's get no policy gradient, [0, 1]; 0 = off, 0.8 keeps the top fifth.
        Entropies are those of the policy that prepares the rollout, once for all its updates.
      correction: for a sampler that is not the trainer: none, or the weight old/sampler of each token or of the whole sequence, truncated to the
        bounds or masked (0) outside them: token_truncate, token_mask, sequence_truncate, sequence_mask.
      correction_low: lower bound of the correction, [0, 1]; 0 = none.
      correction_high: upper bound of the correction, ≥ 1; inf = none.
    """
    mask = loss_tokens(batch.seqs)
    old_logps, out, gap = before_update(nets, batch, *((vocab.entropy,) if entropy_quantile else ()))
    scores, known, metrics = completion_scores(batch, old_logps, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in,
                                               missing_eos_penalty=missing_eos_penalty)
    if overlong_length:
        scores += overlong_punishment(mask.sum(-1), overlong_length=overlong_length, overlong_buffer=overlong_buffer)
    groups = group_statistics(scores, batch.group_ids, known)
    metrics["rollout/zero_variance_groups"] = Mean.of(groups.constant, groups.count > 0)
    advantages = SCALES[advantage_scale](scores, batch.group_ids, known, eps=advantage_eps)[:, None]

    judged = group_statistics(known_scores(batch)[0], batch.group_ids, known)
    batch = trainable_rows(batch, known, mask_truncated=mask_truncated)
    if filter_groups:
        metrics["rollout/filtered_groups"] = Mean.of(judged.constant, judged.count > 0)
        batch = without(batch, judged.constant[batch.group_ids])
    if entropy_quantile:
        advantages = jnp.where(high_entropy(out.entropy, loss_tokens(batch.seqs), entropy_quantile=entropy_quantile), advantages, 0.0)
    batch, corrected = with_advantages(batch, old_logps, advantages, correction=correction, correction_low=correction_low,
                                       correction_high=correction_high)
    return batch, carry, metrics | gap | corrected
