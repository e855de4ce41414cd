"""Causal attention with grouped heads: who sees whom, and the weighted sum."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.types import Array

ELEMENTWISE = ("cpu",)  # backends on which one query per row is a sum of products; elsewhere a dot


def attend(query: Array, key: Array, value: Array, mask: Array, *, scale: float, softcap: float = 0.0) -> Array:
    """softmax(cap(scale · q kᵀ)) v, cap(x) = c·tanh(x / c), with grouped heads; float32 softmax. A query that may see nothing returns finite values
    that nobody reads.

    Args:
      query: [B, T, H, d].
      key, value: [B, S, G, d], G divides H.
      mask: [B, T, S] bool, True where a query may see a key.
      scale: of q·k, usually d^−½.
      softcap: c; 0 = no cap.

    Returns:
      [B, T, H, d].

    See: Ainslie et al. 2023 (arXiv:2305.13245); the cap: Gemma Team 2024 (arXiv:2408.00118).
    """
    chex.assert_rank([query, key, value], 4)
    chex.assert_equal_shape([key, value])
    chex.assert_shape(mask, (query.shape[0], query.shape[1], key.shape[1]))
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], dim)
    if length == 1 and jax.default_backend() in ELEMENTWISE:
        return _attend_one(grouped[:, 0], key, value, mask[:, 0], scale, softcap).reshape(query.shape)
    logits = jnp.einsum("btghd,bsgd->bghts", grouped, key, preferred_element_type=jnp.float32) * scale
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, None, None, :, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bghts,bsgd->btghd", weights, value).reshape(batch, length, heads, dim)


def _attend_one(query: Array, key: Array, value: Array, mask: Array, scale: float, softcap: float) -> Array:
    """`attend` for one query per row, [B, G, H/G, d], as sums of products in the cache's own layout: a dot would transpose keys and values first,
    that is copy the cache for every token."""
    logits = (query[:, None].astype(jnp.float32) * key[:, :, :, None].astype(jnp.float32)).sum(-1) * scale  # [B, S, G, H/G]
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, :, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=1).astype(value.dtype)
    return (weights[..., None].astype(jnp.float32) * value[:, :, :, None].astype(jnp.float32)).sum(1).astype(value.dtype)


def visibility(segment_ids: Array) -> Array:
    """[B, T, T] bool: earlier or same slot, same segment, not padding.

    Args:
      segment_ids: [B, T] int32.
    """
    chex.assert_rank(segment_ids, 2)
    slots = jnp.arange(segment_ids.shape[1])
    causal = slots[:, None] >= slots[None, :]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return causal[None] & same & (segment_ids != 0)[:, None, :]


def within(mask: Array, slot: Array | int, window: int) -> Array:
    """`mask` where the key is one of the query's last `window` slots, its own included. The tokens of a segment lie in a row, so that slots count
    positions.

    Args:
      mask: [B, T, S] bool.
      slot: [] int32, the slot of the first query.
      window: slots; 0 = all.
    """
    chex.assert_rank(mask, 3)
    if not window:
        return mask
    distance = slot + jnp.arange(mask.shape[1])[:, None] - jnp.arange(mask.shape[2])[None, :]
    return mask & (distance < window)[None]
