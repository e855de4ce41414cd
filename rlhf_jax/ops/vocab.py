"""What is read off a chunk of logits: functions `(logits [B, c, V], target [B, c]) -> [B, c]`.

`nets.policy(seqs, want=(logps, entropy))` evaluates them on each chunk of the head's output, so that no [B, T, V] array exists.
An objective may pass a function of its own; the result comes back under the function's name.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.types import Array


def _check(logits: Array, target: Array) -> Array:
    chex.assert_equal_shape_prefix([logits, target], target.ndim)
    chex.assert_rank(logits, target.ndim + 1)
    return logits.astype(jnp.float32)


def lse(logits: Array, target: Array) -> Array:
    """log Σ_v exp(logits_v), nats.

    Args:
      logits: [..., V].
      target: [...] int32.
    """
    return jax.nn.logsumexp(_check(logits, target), axis=-1)


def logps(logits: Array, target: Array) -> Array:
    """log softmax(logits)[target], nats, without the full log-softmax.

    Args:
      logits: [..., V].
      target: [...] int32.
    """
    logits = _check(logits, target)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Array, target: Array) -> Array:
    """−Σ_v p_v log p_v, nats. A logit of −inf counts as p = 0.

    Args:
      logits: [..., V].
      target: [...] int32, unused.
    """
    logits = _check(logits, target)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0.0).sum(-1)


def log_sum_sq_probs(logits: Array, target: Array) -> Array:
    """log Σ_v p_v², nats: minus the Rényi entropy of order 2, at least −log V; what a token of its own has on average, see WPO.

    Args:
      logits: [..., V].
      target: [...] int32, unused.
    """
    logits = _check(logits, target)
    return jax.nn.logsumexp(2.0 * logits, axis=-1) - 2.0 * jax.nn.logsumexp(logits, axis=-1)


def mean_logit(logits: Array, target: Array) -> Array:
    """Mean of the logits over the vocabulary: drifts where nothing holds the normaliser, see SFT's z-loss.

    Args:
      logits: [..., V].
      target: [...] int32, unused.
    """
    return _check(logits, target).mean(-1)


def is_top1(logits: Array, target: Array) -> Array:
    """1 where the target is the likeliest token, else 0.

    Args:
      logits: [..., V].
      target: [...] int32.
    """
    return (jnp.argmax(_check(logits, target), axis=-1) == target).astype(jnp.float32)
