"""Advantages: generalised advantage estimation over the policy's own tokens, and scores relative to those of other samples.

All run in `prepare`, over the global batch, before any split into microbatches (law 3); their results are data for the loss. A row whose
score is unknown (NaN) is one that is not `real` here: it enters no statistic and its advantage is 0.

See: Schulman et al. 2016 (arXiv:1506.02438), eq. 16; Shao et al. 2024, DeepSeekMath (arXiv:2402.03300), section 4.1.2; Ahmadian et al. 2024,
RLOO (arXiv:2402.14740).
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.ops.masking import masked_moments
from rlhf_jax.types import Array


def gae(rewards: Array, values: Array, mask: Array, *, gamma: float, lam: float) -> tuple[Array, Array]:
    """Generalised advantage estimation along the tokens of `mask`, as one reverse scan.

        δ_t = r_t + γ V_{t'} − V_t,    A_t = δ_t + γλ A_{t'},    t' the next token of the mask

    V and A are 0 after the last one. Tokens outside the mask (prompt, environment, padding) are stepped over: they neither
    discount nor carry a value, and a reward placed on one is ignored.

    Args:
      rewards: [B, T] float, received for token t.
      values: [B, T] float, V before token t.
      mask: [B, T] bool, the policy's own tokens.
      gamma: discount per policy token, [0, 1].
      lam: λ, [0, 1]; 0 is one-step temporal difference, 1 is Monte Carlo.

    Returns:
      advantages: [B, T], zero outside the mask.
      returns: [B, T], advantages + values, the value function's target; zero outside the mask.

    See: Schulman et al. 2016, eq. 16.
    """
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    rewards, values = rewards.astype(jnp.float32), values.astype(jnp.float32)

    def step(after: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = after
        reward, value, here = token
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        after = jnp.where(here, value, next_value), jnp.where(here, advantage, next_advantage)
        return after, jnp.where(here, advantage, 0.0)

    end = jnp.zeros_like(values[:, 0])
    _, advantages = jax.lax.scan(step, (end, end), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, jnp.where(mask, advantages.T + values, 0.0)


@struct.dataclass
class GroupStatistics:
    """Statistics of the scores of each group; a group without real rows has zeros."""

    count: Array  # [G] int32, real rows of the group, G = B
    mean: Array  # [G]
    std: Array  # [G], unbiased (n − 1); 0 for a group of one
    constant: Array  # [G] bool, every score of the group is the same (empty groups too)


def group_statistics(scores: Array, group_ids: Array, real: Array) -> GroupStatistics:
    """Count, mean and standard deviation of the scores within each group.

    The standard deviation is the unbiased one: the paper writes std(r) only, and every public implementation (TRL, verl,
    OpenRLHF) calls torch.std. `constant` compares the scores themselves: the rounding of a mean must not pass for variance.

    Args:
      scores: [B] float; may hold anything where not real.
      group_ids: [B] int32, dense in [0, B).
      real: [B] bool.

    Returns:
      GroupStatistics over G = B possible groups.
    """
    chex.assert_rank([scores, group_ids, real], 1)
    chex.assert_equal_shape([scores, group_ids, real])
    chex.assert_type(group_ids, int)
    groups = scores.shape[0]

    def total(x: Array) -> Array:
        return jax.ops.segment_sum(jnp.where(real, x, 0), group_ids, num_segments=groups)

    count = total(jnp.ones_like(group_ids))
    mean = total(scores) / jnp.maximum(count, 1)
    variance = total(jnp.square(scores - mean[group_ids])) / jnp.maximum(count - 1, 1)
    highest = jax.ops.segment_max(jnp.where(real, scores, -jnp.inf), group_ids, num_segments=groups)
    lowest = jax.ops.segment_min(jnp.where(real, scores, jnp.inf), group_ids, num_segments=groups)
    constant = highest <= lowest
    return GroupStatistics(count=count, mean=mean, std=jnp.where(constant, 0.0, jnp.sqrt(variance)), constant=constant)


def group_centred(scores: Array, group_ids: Array, real: Array) -> Array:
    """A_i = r_i − mean(r) over the group, [B]; exactly zero where all its scores are the same and on rows that are not real.

    Args:
      scores: [B] float; may hold anything where not real.
      group_ids: [B] int32, dense in [0, B).
      real: [B] bool.

    See: Liu et al. 2025, Dr. GRPO (arXiv:2503.20783).
    """
    chex.assert_equal_shape([scores, group_ids, real])
    groups = group_statistics(scores, group_ids, real)
    return jnp.where(real & ~groups.constant[group_ids], scores - groups.mean[group_ids], 0.0)


def group_advantages(scores: Array, group_ids: Array, real: Array, *, eps: float) -> Array:
    """Scores relative to their group: A_i = (r_i − mean(r)) / (std(r) + eps), [B].

    Exactly zero in a group whose scores are all the same, in a group of one, and on rows that are not real.

    Args:
      scores: [B] float; may hold anything where not real.
      group_ids: [B] int32, dense in [0, B).
      real: [B] bool.
      eps: added to the standard deviation, ≥ 0.

    See: DeepSeekMath (arXiv:2402.03300), section 4.1.2.
    """
    chex.assert_equal_shape([scores, group_ids, real])
    std = group_statistics(scores, group_ids, real).std[group_ids]
    return _divided(group_centred(scores, group_ids, real), std + eps)


def batch_scaled_advantages(scores: Array, group_ids: Array, real: Array, *, eps: float) -> Array:
    """A_i = (r_i − mean of the group) / (std of the whole batch's scores + eps), [B]: an easy prompt is not blown up.

    Args:
      scores: [B] float; may hold anything where not real.
      group_ids: [B] int32, dense in [0, B).
      real: [B] bool.
      eps: added to the standard deviation, ≥ 0.

    See: Liu et al. 2025, "Tricks or traps?" (arXiv:2508.08221).
    """
    chex.assert_equal_shape([scores, group_ids, real])
    _, variance = masked_moments(scores, real)
    return _divided(group_centred(scores, group_ids, real), jnp.sqrt(variance) + eps)


def unscaled_advantages(scores: Array, group_ids: Array, real: Array, *, eps: float) -> Array:
    """`group_centred` with the signature of its siblings, [B]: dividing by a deviation favours prompts that are nearly solved or hopeless.

    Args:
      scores: [B] float; may hold anything where not real.
      group_ids: [B] int32, dense in [0, B).
      real: [B] bool.
      eps: unused.

    See: Liu et al. 2025, Dr. GRPO (arXiv:2503.20783).
    """
    chex.assert_equal_shape([scores, group_ids, real])
    return group_centred(scores, group_ids, real)


def _divided(x: Array, scale: Array) -> Array:
    """x / scale, x itself where the scale is 0: all that is centred on a constant is 0 there."""
    return x / jnp.where(scale > 0, scale, 1.0)


SCALES = {"group": group_advantages, "batch": batch_scaled_advantages, "none": unscaled_advantages}


def leave_one_out_advantages(scores: Array, group_ids: Array, real: Array) -> Array:
    """A_i = r_i − mean of the other scores of its group, [B]: a baseline that does not depend on the sample itself.

    Exactly zero in a group whose scores are all the same, in a group of one, and on rows that are not real.

    Args:
      scores: [B] float; may hold anything where not real.
      group_ids: [B] int32, dense in [0, B).
      real: [B] bool.

    See: Ahmadian et al. 2024 (arXiv:2402.14740); Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """
    chex.assert_equal_shape([scores, group_ids, real])
    count = group_statistics(scores, group_ids, real).count[group_ids]
    return group_centred(scores, group_ids, real) * (count / jnp.maximum(count - 1, 1))


def standardised(x: Array, real: Array, *, eps: float) -> Array:
    """(x − mean) / (std + eps) over the real rows, [B]; zero elsewhere.

    Args:
      x: [B] float; may hold anything where not real.
      real: [B] bool.
      eps: added to the standard deviation, ≥ 0.
    """
    chex.assert_rank([x, real], 1)
    chex.assert_equal_shape([x, real])
    mean, variance = masked_moments(x, real)
    return jnp.where(real, _divided(x - mean, jnp.sqrt(variance) + eps), 0.0)


def weighted_rewards(rewards: Array, weights: Array) -> tuple[Array, Array]:
    """Several rewards of each completion as one score: Σ_k w_k r_k over those that are known.

    Args:
      rewards: [B, K] float, NaN where a reward does not apply.
      weights: [K].

    Returns:
      scores: [B].
      known: [B] bool, false where no reward applies.
    """
    chex.assert_shape([rewards, weights[None]], (None, weights.shape[0]))
    known = ~jnp.isnan(rewards)
    return jnp.where(known, rewards * weights[None], 0.0).sum(-1), known.any(-1)


def decoupled_advantages(rewards: Array, weights: Array, group_ids: Array, real: Array, *, eps: float) -> Array:
    """Each reward relative to its group, their weighted sum standardised over the batch, [B]: a reward of small spread is not drowned.

    Args:
      rewards: [B, K] float, NaN where a reward does not apply.
      weights: [K].
      group_ids: [B] int32, dense in [0, B).
      real: [B] bool.
      eps: added to both standard deviations, ≥ 0.

    See: Liu et al. 2026, GDPO (arXiv:2601.05242).
    """
    chex.assert_equal_shape([rewards[:, 0], group_ids, real])
    relative = jax.vmap(functools.partial(group_advantages, eps=eps), (1, None, 1), 1)
    known = real[:, None] & ~jnp.isnan(rewards)
    scores, _ = weighted_rewards(relative(rewards, group_ids, known), weights)
    return standardised(scores, known.any(-1), eps=eps)
