"""What a sampler does to logits before it draws. Removed tokens get −inf.

Edits change what the network says (penalties, a bias, bans), cuts keep the likeliest tokens of what is left (top-k, top-p, min-p). The settings are
Python numbers, so a filter that does nothing costs nothing. Ties go to the lower token id, hence the result does not depend on the backend's
sort; the best token is always kept. The log-softmax of the result is `sampler_logps`; the trainer never applies these filters again, where a
moved support would give a log-prob of −inf. Which filters run, and in which order, says sampling/filters.py.

See: Fan et al. 2018 (top-k, arXiv:1805.04833); Holtzman et al. 2020 (top-p, arXiv:1904.09751); Nguyen et al. 2024 (min-p, arXiv:2407.01082);
Keskar et al. 2019 (repetition penalty, arXiv:1909.05858).
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.types import Array

COLDEST = 1e-6  # temperature; logits divided by less may leave float32


def temperature(logits: Array, *, t: float) -> Array:
    """logits / t, [B, V] float32.

    Args:
      logits: [B, V].
      t: temperature, at least COLDEST; greedy decoding is an argmax, not a temperature of 0.

    Raises:
      UserError: the temperature is lower.
    """
    chex.assert_rank(logits, 2)
    if not t >= COLDEST:
        raise UserError(f"sampling.temperature is {t}: a filter's temperature must be at least {COLDEST:g}")
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
    values = jnp.where(logits == 0, 0.0, logits).astype(jnp.float32)  # −0 ties with 0
    probs, ranks = jax.nn.softmax(values, axis=-1), _ranks(values)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, which cannot overflow
        fits = jnp.where(ranks > middle[:, None], probs, 0.0).sum(axis=-1) < p
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    # The lowest logit such that those above it have less than p together, found by its bits: a CPU does 16 rows of 24 000 in 4.3 ms, and in 144 by
    # two sorts.
    _, last = jax.lax.fori_loop(0, 32, halve, (ranks.min(axis=-1) - 1, ranks.max(axis=-1)))
    above, equal = ranks > last[:, None], ranks == last[:, None]
    mass, each = jnp.where(above, probs, 0.0).sum(axis=-1)[:, None], jnp.where(equal, probs, 0.0).max(axis=-1)[:, None]
    place = jnp.cumsum(equal, axis=-1, dtype=jnp.int32) - 1  # among equals, by token id; the first is kept whatever the rounding
    return jnp.where(above | (equal & ((place == 0) | (mass + place * each < p))), logits, -jnp.inf)


def _ranks(values: Array) -> Array:
    """int32 in the order of float32 `values`."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def min_p(logits: Array, *, p: float) -> Array:
    """Tokens whose probability is at least `p` times the likeliest one's, −inf elsewhere, [B, V]: logit ≥ max + log p.

    Args:
      logits: [B, V].
      p: [0, 1]; 0 keeps all, 1 the likeliest alone and its equals.

    Raises:
      UserError: p is outside [0, 1].

    See: Nguyen et al. 2024 (arXiv:2407.01082).
    """
    chex.assert_rank(logits, 2)
    if not 0 <= p <= 1:
        raise UserError(f"sampling.filters: min_p has p = {p}: it must be at least 0 (keeps every token) and at most 1")
    if p == 0:
        return logits
    return jnp.where(logits >= logits.max(axis=-1, keepdims=True) + math.log(p), logits, -jnp.inf)


def repetition_penalty(logits: Array, seen: Array, *, penalty: float) -> Array:
    """Logits of tokens that have been seen, divided by θ where positive and multiplied where negative, [B, V] float32.

    Args:
      logits: [B, V].
      seen: [B, V] bool, whether the token stands in the prompt or in what has been generated.
      penalty: θ > 0; 1 changes nothing, above 1 discourages.

    Raises:
      UserError: the penalty is not positive.

    See: Keskar et al. 2019, section 4.1 (arXiv:1909.05858), who divide negative logits too, which encourages such tokens; multiplied as in
    every implementation since.
    """
    chex.assert_equal_shape([logits, seen])
    if not penalty > 0:
        raise UserError(f"sampling.filters: repetition_penalty has penalty = {penalty}: it must be positive (1 changes nothing)")
    if penalty == 1:
        return logits
    logits = logits.astype(jnp.float32)
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def count_penalty(logits: Array, counts: Array, *, presence: float, frequency: float) -> Array:
    """logits − α · 1[count > 0] − β · count, [B, V] float32.

    Args:
      logits: [B, V].
      counts: [B, V] int32, how often the token has been generated; the prompt does not count.
      presence: α, nats; 0 = none.
      frequency: β, nats per occurrence; 0 = none.

    See: OpenAI's API reference, `presence_penalty` and `frequency_penalty`.
    """
    chex.assert_equal_shape([logits, counts])
    if presence == 0 and frequency == 0:
        return logits
    return logits.astype(jnp.float32) - presence * (counts > 0) - frequency * counts


def add_bias(logits: Array, bias: Array) -> Array:
    """logits + bias, [B, V] float32.

    Args:
      logits: [B, V].
      bias: [V] float32 nats, finite.
    """
    chex.assert_shape(bias, logits.shape[-1:])
    return logits.astype(jnp.float32) + bias[None, :]


def ban(logits: Array, banned: Array) -> Array:
    """−inf where `banned`, [B, V]; a row that would lose every token keeps them all, since something has to be drawn.

    Args:
      logits: [B, V].
      banned: [B, V] bool, or [1, V] for every row.
    """
    chex.assert_equal_rank([logits, banned])
    kept = jnp.where(banned, -jnp.inf, logits)
    return jnp.where((kept > -jnp.inf).any(axis=-1, keepdims=True), kept, logits)
