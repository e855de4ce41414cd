"""PPO's clipped losses, unreduced: what PPO, GRPO and their relatives share.

Ratios come in as log-ratios (law: log space), so that a policy equal to the old one has a ratio of exactly 1.

See: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; value clipping: Huang et al. 2022, "The 37 implementation details of PPO".
Deviation: lower and upper clip bounds are separate (Yu et al. 2025, DAPO, arXiv:2503.14476); equal bounds are the paper's.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from rlhf_jax.ops.kl import exp_ratio
from rlhf_jax.types import Array


def clipped_surrogate(log_ratio: Array, advantages: Array, *, clip_low: float, clip_high: float) -> Array:
    """−min( ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A ),   ρ = π/π_old.

    Args:
      log_ratio: log ρ of each action, any shape, nats; zero it where masked.
      advantages: same shape, held fixed.
      clip_low: how far the ratio may fall below 1, [0, 1).
      clip_high: how far the ratio may rise above 1, ≥ 0.

    Returns:
      The loss per action, same shape.

    See: Schulman et al. 2017, eq. 7.
    """
    chex.assert_equal_shape([log_ratio, advantages])
    ratio = exp_ratio(log_ratio)
    return jnp.maximum(-ratio * advantages, -jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages)


def surrogate_is_clipped(log_ratio: Array, advantages: Array, *, clip_low: float, clip_high: float) -> Array:
    """True where the clip takes the gradient away: the ratio is out of bounds on the side that the advantage pushes to.

    Args:
      log_ratio: log ρ of each action, any shape, nats.
      advantages: same shape.
      clip_low: as in `clipped_surrogate`.
      clip_high: as in `clipped_surrogate`.

    Returns:
      Same shape, bool.
    """
    chex.assert_equal_shape([log_ratio, advantages])
    ratio = exp_ratio(log_ratio)
    return ((advantages > 0) & (ratio > 1.0 + clip_high)) | ((advantages < 0) & (ratio < 1.0 - clip_low))


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
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return jnp.square(near - returns) > jnp.square(values - returns)
