"""Causal attention with grouped heads: who sees whom, and the weighted sum."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.ops.backends import ELEMENTWISE, platform
from rlhf_jax.types import Array


class Forked(NamedTuple):
    """Who sees whom in rows [P | N | N | …] of one prompt and G responses to it: every response sees the prompt and itself."""

    prompt: Array  # [g, Q, P] bool, the prompt's queries (from slot P − Q on)
    responses: Array  # [g, G, N, P + N] bool

    def reading(self, start: int) -> Forked:
        """Without the prompt's first `start` queries."""
        return self._replace(prompt=self.prompt[:, start:])

    def within(self, slot: int, window: int) -> Forked:
        """As the function of this name, the prompt's first query in slot `slot`."""
        after = self.responses.shape[-1] - self.responses.shape[-2]
        return Forked(self.prompt & _near(self.prompt, slot, window), self.responses & _near(self.responses, after, window)) if window else self


Mask = Array | Forked


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
    logits = jnp.einsum("btghd,bsgd->bghts", grouped, key, preferred_element_type=jnp.float32)
    weights = _weights(logits, mask[:, None, None, :, :], scale, softcap).astype(value.dtype)
    return jnp.einsum("bghts,bsgd->btghd", weights, value).reshape(batch, length, heads, dim)


def _weights(logits: Array, mask: Array, scale: float, softcap: float) -> Array:
    logits = logits * scale
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    return jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)


def attend_forked(query: Array, key: Array, value: Array, mask: Forked, *, scale: float, softcap: float = 0.0) -> Array:
    """`attend` in rows of one prompt and G responses to it, whose keys and values of the prompt are there once.

    Args:
      query: [g, Q + G·N, H, d], the last Q slots of the prompt and the responses one after the other.
      key, value: [g, P + G·N, K, d], K divides H.
      mask: of the same sizes.
      scale, softcap: as in `attend`.

    Returns:
      [g, Q + G·N, H, d].

    See: Juravsky et al. 2024, Hydragen (arXiv:2402.05099), for decoding; here the gradient goes through it, and the softmax is one.
    """
    chex.assert_rank([query, key, value], 4)
    chex.assert_equal_shape([key, value])
    (rows, queries, prompt), (_, group, length, _) = mask.prompt.shape, mask.responses.shape
    first = attend(query[:, :queries], key[:, :prompt], value[:, :prompt], mask.prompt, scale=scale, softcap=softcap)
    own = lambda y: y[:, -group * length :].reshape(rows, group, length, *y.shape[2:])  # noqa: E731
    q = own(query).reshape(rows, group, length, key.shape[2], -1, query.shape[-1])
    to_prompt = jnp.einsum("xbnghd,xpgd->xbghnp", q, key[:, :prompt], preferred_element_type=jnp.float32)
    to_own = jnp.einsum("xbnghd,xbmgd->xbghnm", q, own(key), preferred_element_type=jnp.float32)
    logits = jnp.concatenate([to_prompt, to_own], axis=-1)
    weights = _weights(logits, mask.responses[:, :, None, None], scale, softcap).astype(value.dtype)
    out = jnp.einsum("xbghnp,xpgd->xbnghd", weights[..., :prompt], value[:, :prompt])
    out = out + jnp.einsum("xbghnm,xbmgd->xbnghd", weights[..., prompt:], own(value))
    return jnp.concatenate([first, out.reshape(rows, group * length, *query.shape[2:])], axis=1)


def attend_cache(query: Array, key: Array, value: Array, mask: Array, *, scale: float, softcap: float = 0.0) -> Array:
    """`attend` to keys and values that lie as the sums over them run: no copy, no transposition per token.

    Args:
      query: [B, T, H, d].
      key: [B, G, d, S], the slots last: a query's products with all of them are added as whole vectors.
      value: [B, G, S, d].
      mask: [B, T, S] bool.
      scale, softcap: as for `attend`.

    Returns:
      [B, T, H, d], of the query's type.
    """
    chex.assert_rank([query, key, value], 4)
    chex.assert_shape(mask, (query.shape[0], query.shape[1], key.shape[3]))
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[1], heads // key.shape[1], dim)
    elementwise = platform() in ELEMENTWISE
    one, wide = length == 1 and elementwise, jnp.float32 if elementwise else query.dtype  # XLA's CPU has no bfloat16 dots over such layouts
    if one:  # fused into one pass, whatever the precision of the cache
        logits = (grouped[:, 0, :, :, :, None].astype(jnp.float32) * key[:, :, None].astype(jnp.float32)).sum(3)[:, :, :, None]
    else:
        logits = jnp.einsum("btgrd,bgds->bgrts", grouped.astype(wide), key.astype(wide), preferred_element_type=jnp.float32)
    weights = _weights(logits, mask[:, None, None, :, :], scale, softcap).astype(query.dtype)
    if one:
        attended = (weights[:, :, :, 0, :, None].astype(jnp.float32) * value[:, :, None].astype(jnp.float32)).sum(3)
    else:
        attended = jnp.einsum("bgrts,bgsd->btgrd", weights.astype(wide), value.astype(wide))
    return attended.astype(query.dtype).reshape(batch, length, heads, dim)


def visibility(segment_ids: Array) -> Array:
    """[B, T, T] bool: earlier or same slot, same segment, not padding.

    Args:
      segment_ids: [B, T] int32.
    """
    chex.assert_rank(segment_ids, 2)
    return seen(segment_ids, segment_ids, 0, 0, 0)


def seen(of: Array, to: Array, first: Array | int, begin: Array | int, window: int) -> Array:
    """[B, Q, S] bool: what a part of a row's queries sees of a part of its keys.

    Args:
      of: [B, Q] int32, the segments of the queries.
      to: [B, S] int32, those of the keys.
      first, begin: [] int32, the slots of the first query and of the first key.
      window: slots, the query's own included; 0 = all.
    """
    chex.assert_rank([of, to], 2)
    age = (first + jnp.arange(of.shape[1]))[:, None] - (begin + jnp.arange(to.shape[1]))[None, :]
    near = (age >= 0) & (age < window) if window else age >= 0
    return near[None] & (of[:, :, None] == to[:, None, :]) & (to != 0)[:, None, :]


def forked(segment_ids: Array, prefix: tuple[int, int]) -> Forked:
    """`visibility` of rows whose neighbours share a prompt.

    Args:
      segment_ids: [B, T] int32.
      prefix: (G, P), as in types.Sequences.
    """
    chex.assert_rank(segment_ids, 2)
    (group, prompt), visible = prefix, visibility(segment_ids)
    visible = visible.reshape(-1, group, *visible.shape[1:])
    return Forked(visible[:, 0, :prompt, :prompt], visible[:, :, prompt:])


def within(mask: Array, slot: Array | int, window: int) -> Array:
    """`mask` where the key is one of the query's last `window` slots, its own included. The tokens of a segment lie in a row, so that slots count
    positions.

    Args:
      mask: [B, T, S] bool.
      slot: [] int32, the slot of the first query.
      window: slots; 0 = all.
    """
    chex.assert_rank(mask, 3)
    return mask & _near(mask, slot, window) if window else mask


def _near(mask: Array, slot: Array | int, window: int) -> Array:
    """[…, queries, keys] bool of a mask's rank, the first query in slot `slot`."""
    queries, keys = mask.shape[-2:]
    near = slot + jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :] < window
    return near.reshape((1,) * (mask.ndim - 2) + near.shape)
