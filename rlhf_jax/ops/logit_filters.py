"""What a sampler does to logits before it draws: temperature, then top-k, then top-p. Removed tokens get −inf.

The settings are Python numbers, so a filter that does nothing costs nothing. Ties go to the lower token id, hence the result does
not depend on the backend's sort; the best token is always kept. The log-softmax of the result is `sampler_logps`; the trainer never
applies these filters again, where a moved support would give a log-prob of −inf.

See: Fan et al. 2018 (top-k, arXiv:1805.04833); Holtzman et al. 2020 (top-p, arXiv:1904.09751).
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.types import Array


def temperature(logits: Array, *, t: float) -> Array:
    """logits / t, [B, V] float32.

    Args:
      logits: [B, V].
      t: temperature, > 0; greedy decoding is an argmax, not a temperature of 0.

    Raises:
      UserError: the temperature is not positive.
    """
    chex.assert_rank(logits, 2)
    if not t > 0:
        raise UserError(f"sampling.temperature is {t}: a filter's temperature must be positive")
    logits = logits.astype(jnp.float32)
    return logits if t == 1 else logits / t


def top_k(logits: Array, *, k: int) -> Array:
    """The `k` largest logits, −inf elsewhere, [B, V]; exactly `k` are kept, ties to the lower token id.

    Args:
      logits: [B, V].
      k: ≥ 0; 0, or V and more, keeps all.

    Raises:
      UserError: k is negative.
    """
    chex.assert_rank(logits, 2)
    if k < 0:
        raise UserError(f"sampling.top_k is {k}: it must be 0 (keep every token) or a positive number of tokens")
    if k == 0 or k >= logits.shape[-1]:
        return logits
    _, kept = jax.lax.top_k(logits, k)  # documented to prefer the lower index among equals
    keep = jnp.zeros(logits.shape, bool).at[jnp.arange(logits.shape[0])[:, None], kept].set(True)
    return jnp.where(keep, logits, -jnp.inf)


def top_p(logits: Array, *, p: float) -> Array:
    """The smallest set of most probable tokens whose probability reaches `p`, −inf elsewhere, [B, V].

    A token stays if those ranked before it have less than `p` together; ties rank by token id.

    Args:
      logits: [B, V]; −inf counts as probability 0.
      p: (0, 1]; 1 keeps all.

    Raises:
      UserError: p is outside (0, 1].
    """
    chex.assert_rank(logits, 2)
    if not 0 < p <= 1:
        raise UserError(f"sampling.top_p is {p}: it must be above 0 and at most 1 (1 keeps every token)")
    if p == 1:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    # The first is kept by name: its `before` is 0 only up to rounding.
    keep_ranked = (before < p).at[:, 0].set(True)
    keep = jnp.take_along_axis(keep_ranked, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)
