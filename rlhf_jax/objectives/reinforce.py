"""REINFORCE: the plain policy gradient on the score of the whole completion, less a KL penalty and a baseline.

    L = −1/B Σ_i (R_i − b) Σ_t log π(o_t),   R = score − β Σ_t k( π_old(o_t)/π_ref(o_t) ),   b = mean(R) over the batch

Use: one sample per prompt, one update per rollout, no critic: the simplest thing that works, and the yardstick of the others.
See: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".
Deviation: the baseline is the batch's mean, the row itself included. There is no ratio, so samples of an older policy bias the gradient: keep
config.run.epochs and minibatches at 1.
"""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives import _policy
from rlhf_jax.objectives._policy import evaluate, penalties, sequence_sums
from rlhf_jax.objectives._rollouts import before_update, completion_scores, trainable_rows, with_advantages
from rlhf_jax.ops.masking import masked_moments
from rlhf_jax.types import Array, Mean, PyTree, Rollout

NEEDS = {"reference": "beta", "reward": ""}
DEFAULTS: dict[str, Any] = {
    "beta": 0.05, "kl_estimator": "k1", "kl_in": "reward", "batch_baseline": True, "missing_eos_penalty": 1.0, "mask_truncated": False,
    **_policy.DEFAULTS,
}
RANGES = _policy.RANGES


def centred(returns: Array, known: Array, *, batch_baseline: bool) -> Array:
    """R − b, 0 where R is not known, [B].

    Args:
      returns: R, [B].
      known: [B] bool.
      batch_baseline: subtract the mean over the batch, which changes the gradient's variance and not its direction.
    """
    chex.assert_equal_shape([returns, known])
    baseline, _ = masked_moments(returns, known)
    return jnp.where(known, returns - baseline if batch_baseline else returns, 0.0)


def prepare(
    nets: Any, batch: Rollout, carry: PyTree, key: Array, *, beta: float, kl_estimator: str, kl_in: str, batch_baseline: bool,
    missing_eos_penalty: float, mask_truncated: bool, correction: str, correction_low: float, correction_high: float,
) -> tuple[Rollout, PyTree, dict[str, Mean]]:
    chex.assert_rank(batch.seqs.tokens, 2)
    old_logps, _, gap = before_update(nets, batch)
    returns, known, metrics = completion_scores(batch, old_logps, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in,
                                                missing_eos_penalty=missing_eos_penalty)
    advantages = centred(returns, known, batch_baseline=batch_baseline)[:, None]
    batch, corrected = with_advantages(
        trainable_rows(batch, known, mask_truncated=mask_truncated), old_logps, advantages, correction=correction, correction_low=correction_low,
        correction_high=correction_high)
    return batch, carry, metrics | gap | corrected


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, off_policy_kl: float, beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool,
    entropy_coef: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    now = evaluate(nets, batch, keys, ratio_level="token", off_policy_kl=off_policy_kl)
    terms = {"policy": sequence_sums(-now.advantages * now.logps, now)} | penalties(
        now, sequence_sums, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
    return terms, now.metrics()
