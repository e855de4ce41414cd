"""PPO's clipped losses, unreduced: what PPO, GRPO and their relatives share.

Ratios come in as log-ratios (law: log space), so that a policy equal to the old one has a ratio of exactly 1.

See: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; value clipping: Huang et al. 2022, "The 37 implementation details of PPO".
Deviation: lower and upper clip bounds are separate (Yu et al. 2025, DAPO, arXiv:2503.14476); equal bounds are the paper's.
"""

from __future__ import annotations

import math

import chex
import jax.numpy as jnp

from rlhf_jax.ops.kl import exp_ratio
from rlhf_jax.types import Array


def clipped_surrogate(
    log_ratio: Array, advantages: Array, *, clip_low: float, clip_high: float, dual_clip: float = math.inf
) -> Array:
    """−min( ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A ),   ρ = π/π_old; where A < 0, at most −dual_clip · A.

    A negative advantage leaves PPO's loss unbounded as ρ grows, which dual clipping stops.

    Args:
      log_ratio: log ρ of each action, any shape, nats; zero it where masked.
      advantages: same shape, held fixed.
      clip_low: how far the ratio may fall below 1, [0, 1].
      clip_high: how far the ratio may rise above 1, ≥ 0.
      dual_clip: largest ratio that counts where the advantage is negative, ≥ 1; 3 is usual, inf = off.

    Returns:
      The loss per action, same shape.

    See: Schulman et al. 2017, eq. 7; dual clipping: Ye et al. 2020 (arXiv:1912.09729); δ in INTELLECT-2 (arXiv:2505.07291).
    """
    chex.assert_equal_shape([log_ratio, advantages])
    ratio = exp_ratio(log_ratio)
    kept = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(-ratio * advantages, -kept * advantages)
    if math.isinf(dual_clip):
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def clipped_sides(
    log_ratio: Array, advantages: Array, *, clip_low: float, clip_high: float, dual_clip: float = math.inf
) -> tuple[Array, Array]:
    """True where a clip takes the gradient away, by the side on which the ratio is out of bounds: too small with A < 0, too large with A > 0 or
    beyond `dual_clip`.

    Args:
      log_ratio: log ρ of each action, any shape, nats.
      advantages: same shape.
      clip_low: how far the ratio may fall below 1, [0, 1].
      clip_high: how far the ratio may rise above 1, ≥ 0.
      dual_clip: largest ratio that counts where the advantage is negative, ≥ 1; inf = off.

    Returns:
      Below and above, same shape, bool each.
    """
    chex.assert_equal_shape([log_ratio, advantages])
    ratio = exp_ratio(log_ratio)
    below = (advantages < 0) & (ratio < 1.0 - clip_low)
    return below, ((advantages > 0) & (ratio > 1.0 + clip_high)) | ((advantages < 0) & (ratio > dual_clip))


def clipped_value_loss(values: Array, old_values: Array, returns: Array, *, clip: float) -> Array:
    """½ max( (V − R)², (V_old + clip(V − V_old, ±clip) − R)² ).

    Args:
      values: V of the critic being trained, any shape.
      old_values: same shape, V when the rollout was prepared.
      returns: same shape, the target R.
      clip: how far V may move from V_old before the loss goes flat, > 0.

    Returns:
      The loss per token, same shape, ≥ 0.

    See: Huang et al. 2022, detail 9; Ziegler et al. 2019's code, `vf_losses2`.
    """
    chex.assert_equal_shape([values, old_values, returns])
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))


def value_is_clipped(values: Array, old_values: Array, returns: Array, *, clip: float) -> Array:
    """True where the clipped branch of `clipped_value_loss` is the larger one.

    Args:
      values: V of the critic being trained, any shape.
      old_values: same shape.
      returns: same shape.
      clip: as in `clipped_value_loss`.

    Returns:
      Same shape, bool.
    """
    chex.assert_equal_shape([values, old_values, returns])
    moved = values - old_values
    near = old_values + jnp.clip(moved, -clip, clip)  # within the bounds it is V but for rounding, which is no clip
    return (jnp.abs(moved) > clip) & (jnp.square(near - returns) > jnp.square(values - returns))
