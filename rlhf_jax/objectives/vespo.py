"""VESPO: a policy gradient whose importance weight of the whole sequence is reshaped by a Gamma kernel instead of clipped.

    L = −1/Σ_i |o_i| Σ_i Σ_t sg[ φ(W_i) ] A_i log π(o_t),   W = π(o)/μ(o),   φ(W) = W^k e^{λ (1 − W)}
    (k, λ) = (k_pos, lambda_pos) if A_i ≥ 0, else (k_neg, lambda_neg);   A_i = (r_i − mean(r)) / (std(r) + eps)   over one prompt's samples

Use: stale or asynchronous rollouts: the product of all ratios is used as it is, without clip or length normalisation, and cannot blow up.
See: Shen et al. 2026 (arXiv:2602.10693); k and λ are those of the authors' code.
Deviation: none; μ is π_old, and with a correction the sampler as far as the correction lets it count: log W gains Σ_t log w_t, or log w of a
whole sequence, where a masked weight counts as 1e-8. W is held within [1e-8, e²⁰] as in the authors' code, whose bound of ±20 nats on each
token's log-ratio is left out.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._policy import evaluate, penalties, token_means
from rlhf_jax.objectives._rollouts import corrections, filled
from rlhf_jax.ops.masking import loss_tokens, masked_sum
from rlhf_jax.types import Array, Mean, PyTree, Rollout

NEEDS = _groups.NEEDS
DEFAULTS = {**_groups.DEFAULTS, "k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
RANGES = {
    **_groups.RANGES, "k_pos": (0.0, math.inf), "lambda_pos": (1e-4, math.inf), "k_neg": (0.0, math.inf), "lambda_neg": (1e-4, math.inf),
}
LOWEST, HIGHEST = math.log(1e-8), 20.0  # nats, of log W


def gamma_weights(
    log_weights: Array, advantages: Array, *, k_pos: float, lambda_pos: float, k_neg: float, lambda_neg: float
) -> Array:
    """φ(W) = W^k e^{λ (1 − W)}: 1 at W = 1, largest at W = k/λ, 0 at both ends; no gradient goes through, same shape.

    Args:
      log_weights: log W, nats, any shape.
      advantages: same shape.
      k_pos: power of W where the advantage is not negative, ≥ 0: the higher, the less an unlikely sequence counts.
      lambda_pos: decay in W where the advantage is not negative, > 0: the higher, the less a sequence counts that became much likelier.
      k_neg: power of W where the advantage is negative, ≥ 0.
      lambda_neg: decay in W where the advantage is negative, > 0.

    See: Shen et al. 2026.
    """
    chex.assert_equal_shape([log_weights, advantages])
    log_w = jax.lax.stop_gradient(jnp.clip(log_weights.astype(jnp.float32), LOWEST, HIGHEST))
    k = jnp.where(advantages >= 0, k_pos, k_neg)
    decay = jnp.where(advantages >= 0, lambda_pos, lambda_neg)
    return jnp.exp(k * log_w + decay * (1.0 - jnp.exp(log_w)))


class CorrectedRollout(Rollout, kw_only=True):
    """A rollout, and how much likelier its rows are under the old policy than under the sampler."""

    log_correction: Array  # [B] float32 nats


def log_correction(weights: Array, mask: Array) -> Array:
    """Σ_t log w_t of each row, or log w of a whole sequence, [B] nats; a masked weight counts as 1e-8.

    Args:
      weights: corrections of each token [B, T], or of each row [B, 1].
      mask: [B, T] bool.
    """
    chex.assert_equal_rank([weights, mask])
    log_w = jnp.log(jnp.maximum(weights, 1e-8))
    return log_w[:, 0] if weights.shape[1] == 1 else masked_sum(log_w, mask)


def prepare(
    nets: Any, batch: Rollout, carry: PyTree, key: Array, *, beta: float, kl_estimator: str, kl_in: str, advantage_scale: str,
    advantage_eps: float, missing_eos_penalty: float, overlong_length: int, overlong_buffer: int, mask_truncated: bool, filter_groups: bool,
    entropy_quantile: float, correction: str, correction_low: float, correction_high: float,
) -> tuple[CorrectedRollout, PyTree, dict[str, Mean]]:
    chex.assert_equal_shape([batch.seqs.tokens, batch.sampler_logps])
    batch, carry, metrics = _groups.prepare(
        nets, batch, carry, key, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, advantage_scale=advantage_scale, advantage_eps=advantage_eps,
        missing_eos_penalty=missing_eos_penalty, overlong_length=overlong_length, overlong_buffer=overlong_buffer, mask_truncated=mask_truncated,
        filter_groups=filter_groups, entropy_quantile=entropy_quantile, correction="none", correction_low=0.0, correction_high=1.0)
    mask, (old_logps,) = loss_tokens(batch.seqs), filled(batch, "old_logps")
    weights, corrected = corrections(old_logps, batch.sampler_logps, mask, correction=correction, correction_low=correction_low,
                                     correction_high=correction_high)
    return CorrectedRollout(**vars(batch), log_correction=log_correction(weights, mask)), carry, metrics | corrected


def loss(
    nets: Any, batch: CorrectedRollout, keys: Array | None, *, k_pos: float, lambda_pos: float, k_neg: float, lambda_neg: float, off_policy_kl: float,
    beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool, entropy_coef: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    now = evaluate(nets, batch, keys, ratio_level="token", off_policy_kl=off_policy_kl)
    log_weights = jnp.broadcast_to((masked_sum(now.log_ratios, now.mask) + batch.log_correction)[:, None], now.mask.shape)
    phi = gamma_weights(log_weights, now.advantages, k_pos=k_pos, lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg)
    terms = {"policy": token_means(-phi * now.advantages * now.logps, now)} | penalties(
        now, token_means, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
    return terms, now.metrics()
