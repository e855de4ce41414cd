"""Reward shaping: what is added to a completion's score before advantages are taken."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.types import Array


def overlong_punishment(lengths: Array, *, overlong_length: int, overlong_buffer: int) -> Array:
    """0 up to overlong_length − overlong_buffer tokens, falling linearly to −1 at overlong_length, −1 beyond, [B].

    Args:
      lengths: tokens of each completion, [B].
      overlong_length: tokens at which the punishment reaches −1, the sampler's budget; 0 = no punishment (in an objective).
      overlong_buffer: tokens over which the punishment sets in, 1 … overlong_length; the paper's is a fifth of the budget.

    Raises:
      UserError: a buffer out of that range.

    See: Yu et al. 2025, DAPO (arXiv:2503.14476), eq. 13.
    """
    chex.assert_rank(lengths, 1)
    if not 0 < overlong_buffer <= overlong_length:
        raise UserError(f"config.objective.overlong_buffer = {overlong_buffer}: with overlong_length = {overlong_length} tokens it must lie "
                        "between 1 and that, a fifth of it as a rule")
    over = lengths.astype(jnp.float32) - (overlong_length - overlong_buffer)
    return -jnp.clip(over / overlong_buffer, 0.0, 1.0)
