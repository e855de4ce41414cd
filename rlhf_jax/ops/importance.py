"""Importance weights of a policy gradient: the level at which π/π_old is taken, the correction π_old/π_sampler, and which tokens count at all.

Three log-probs, never confused: the sampler's (the distribution drawn from), the old ones (trainer, when the rollout was prepared) and the new
ones. A policy ratio is new/old and is differentiated; a correction is old/sampler and is data.

See: sequence ratios: Zheng et al. 2025, GSPO (arXiv:2507.18071); corrections: Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training" (truncated), the Ling team 2025 (arXiv:2510.18855, IcePop: masked).
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.ops.kl import exp_ratio
from rlhf_jax.ops.masking import masked_mean, masked_sum
from rlhf_jax.types import Array

# --- the level of the policy ratio ---


def token_level(log_ratios: Array, mask: Array) -> Array:
    """log ρ_t, as it is, [B, T] nats.

    Args:
      log_ratios: log π − log π_old, [B, T] nats.
      mask: [B, T] bool, the policy's own tokens.
    """
    chex.assert_rank([log_ratios, mask], 2)
    chex.assert_equal_shape([log_ratios, mask])
    return log_ratios


def sequence_level(log_ratios: Array, mask: Array) -> Array:
    """log s = 1/|y| Σ_t log ρ_t on every token of the row: the geometric mean of the token ratios, [B, T] nats.

    Args:
      log_ratios: log π − log π_old, [B, T] nats.
      mask: [B, T] bool, the policy's own tokens.

    See: Zheng et al. 2025, eq. 7.
    """
    chex.assert_rank([log_ratios, mask], 2)
    chex.assert_equal_shape([log_ratios, mask])
    return jnp.broadcast_to(masked_mean(log_ratios, mask)[:, None], log_ratios.shape)


def sequence_token_level(log_ratios: Array, mask: Array) -> Array:
    """log( sg[s] · ρ_t / sg[ρ_t] ): the sequence's ratio in value, the token's own gradient, [B, T] nats.

    The same as `sequence_level` where all tokens of a row have one advantage, and the right one where they have not.

    Args:
      log_ratios: log π − log π_old, [B, T] nats.
      mask: [B, T] bool, the policy's own tokens.

    See: Zheng et al. 2025, eq. 14 (GSPO-token).
    """
    chex.assert_rank([log_ratios, mask], 2)
    return log_ratios + jax.lax.stop_gradient(sequence_level(log_ratios, mask) - log_ratios)


LEVELS = {"token": token_level, "sequence": sequence_level, "sequence_token": sequence_token_level}

# --- the correction for a sampler that is not the trainer ---


def uncorrected(log_ratios: Array, mask: Array, *, correction_low: float, correction_high: float) -> Array:
    """1, [B, T].

    Args:
      log_ratios: log π_old − log π_sampler, [B, T] nats.
      mask: [B, T] bool, the policy's own tokens.
      correction_low: smallest weight π_old/π_sampler that counts in full, ≥ 0.
      correction_high: largest weight π_old/π_sampler that counts in full, ≥ 1; inf = no bound.
    """
    chex.assert_equal_shape([log_ratios, mask])
    return jnp.ones_like(log_ratios)


def token_truncate(log_ratios: Array, mask: Array, *, correction_low: float, correction_high: float) -> Array:
    """w_t = clip(π_old/π_sampler, low, high) of each token, [B, T].

    Args:
      log_ratios: log π_old − log π_sampler, [B, T] nats.
      mask: [B, T] bool, the policy's own tokens.
      correction_low: smaller weights are raised to it, ≥ 0.
      correction_high: larger weights are lowered to it; inf = no bound.

    See: Yao et al. 2025 (TIS).
    """
    chex.assert_rank([log_ratios, mask], 2)
    return jnp.clip(_weights(log_ratios, mask), correction_low, correction_high)


def token_mask(log_ratios: Array, mask: Array, *, correction_low: float, correction_high: float) -> Array:
    """w_t = π_old/π_sampler of each token, 0 outside [low, high], [B, T].

    Args:
      log_ratios: log π_old − log π_sampler, [B, T] nats.
      mask: [B, T] bool, the policy's own tokens.
      correction_low: tokens of smaller weight are left out, ≥ 0.
      correction_high: tokens of larger weight are left out; inf = no bound.

    See: the Ling team 2025, IcePop.
    """
    chex.assert_rank([log_ratios, mask], 2)
    return _within(_weights(log_ratios, mask), correction_low, correction_high)


def sequence_truncate(log_ratios: Array, mask: Array, *, correction_low: float, correction_high: float) -> Array:
    """w = clip(Π_t π_old/π_sampler, low, high) of each row, [B, 1].

    Args:
      log_ratios: log π_old − log π_sampler, [B, T] nats.
      mask: [B, T] bool, the policy's own tokens.
      correction_low: smaller weights are raised to it, ≥ 0.
      correction_high: larger weights are lowered to it; inf = no bound.
    """
    chex.assert_rank([log_ratios, mask], 2)
    return jnp.clip(_row_weights(log_ratios, mask), correction_low, correction_high)


def sequence_mask(log_ratios: Array, mask: Array, *, correction_low: float, correction_high: float) -> Array:
    """w = Π_t π_old/π_sampler of each row, 0 outside [low, high], [B, 1].

    Args:
      log_ratios: log π_old − log π_sampler, [B, T] nats.
      mask: [B, T] bool, the policy's own tokens.
      correction_low: rows of smaller weight are left out, ≥ 0.
      correction_high: rows of larger weight are left out; inf = no bound.
    """
    chex.assert_rank([log_ratios, mask], 2)
    return _within(_row_weights(log_ratios, mask), correction_low, correction_high)


CORRECTIONS = {
    "none": uncorrected, "token_truncate": token_truncate, "token_mask": token_mask, "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
}


def _weights(log_ratios: Array, mask: Array) -> Array:
    return exp_ratio(jnp.where(mask, log_ratios, 0.0).astype(jnp.float32))


def _row_weights(log_ratios: Array, mask: Array) -> Array:
    return exp_ratio(masked_sum(log_ratios.astype(jnp.float32), mask)[:, None])


def _within(weights: Array, low: float, high: float) -> Array:
    return jnp.where((weights >= low) & (weights <= high), weights, 0.0)


# --- which tokens count ---


def on_policy(advantages: Array, log_ratios: Array, mask: Array, *, off_policy_kl: float) -> Array:
    """False on the tokens of a row that has a negative advantage and that the policy has left: 1/|y| Σ_t log π_sampler/π > off_policy_kl, [B, T].

    Args:
      advantages: [B, T].
      log_ratios: log π − log π_sampler, [B, T] nats; no gradient goes through.
      mask: [B, T] bool, the policy's own tokens.
      off_policy_kl: nats per token above which a row with a negative advantage gives no gradient; inf = off.

    See: DeepSeek-AI 2025, DeepSeek-V3.2 (arXiv:2512.02556), eq. 9.
    """
    chex.assert_rank([advantages, log_ratios, mask], 2)
    chex.assert_equal_shape([advantages, log_ratios, mask])
    kl = masked_mean(-jax.lax.stop_gradient(log_ratios), mask)
    return (advantages >= 0) | (kl <= off_policy_kl)[:, None]


def high_entropy(entropy: Array, mask: Array, *, entropy_quantile: float) -> Array:
    """True on the masked tokens whose entropy is at or above that quantile of all of them, [B, T] bool.

    The threshold is the order statistic next above the interpolated quantile: the two select the same tokens, but interpolation may round
    above a token that it falls on.

    Args:
      entropy: nats, [B, T], of the whole batch.
      mask: [B, T] bool, the policy's own tokens.
      entropy_quantile: tokens whose entropy is below this quantile of the batch's get no policy gradient, [0, 1]; 0 = off, 0.8 keeps the top fifth.

    See: Wang et al. 2025, "Beyond the 80/20 rule" (arXiv:2506.01939), section 5.
    """
    chex.assert_rank([entropy, mask], 2)
    chex.assert_equal_shape([entropy, mask])
    entropy = entropy.astype(jnp.float32)
    ordered = jnp.sort(jnp.where(mask, entropy, math.inf), axis=None)
    rank = jnp.ceil(entropy_quantile * (mask.sum() - 1) - 1e-4).astype(jnp.int32)
    return mask & (entropy >= ordered[jnp.maximum(rank, 0)])
