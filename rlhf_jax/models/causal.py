"""Causal attention of whole rows, several segments to a row: one function, and an implementation for each platform.

`attend_rows` chooses by the platform of the mesh (ops/backends.py) and by what a kernel takes:

    splash  TPU      a Pallas kernel: no logits in memory (models/kernels.py)
    cudnn   GPU      cuDNN's fused attention: no logits in memory (models/kernels.py)
    stairs  CPU      query blocks, each of which meets the keys up to its own end, or its window, alone
    blocks  any      one query block after another against all keys, recomputed in the backward pass: [B, H, block, T] logits at a time
    whole   any      short rows: all logits at once

On a mesh with an axis `sequence` the slots of a row are spread over devices. Each gathers the keys and values of its rows (the gradient scatters them
back) and lets its own queries attend, in global slots. Gathering, not a ring: grouped heads make keys and values small beside the activations, one
softmax needs no merging, and the implementations above serve as they are. Deviation: rows are split contiguously, so that under `blocks`
the devices with early slots compute logits which their masks then hide.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.models import kernels
from rlhf_jax.models.attention import attend, seen
from rlhf_jax.ops import partition
from rlhf_jax.ops.backends import CAUSAL, LONG, STAIR, platform
from rlhf_jax.types import Array

BLOCK = 512  # queries whose logits exist at once under `blocks`
QUERIES, KEYS, SLOTS = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None), ("batch", None)


class Rows(NamedTuple):
    """Who sees whom in whole rows: earlier slots and its own of the same segment, padding apart."""

    segment_ids: Array  # [B, T] int32


class How(NamedTuple):
    """What the logits are made of."""

    scale: float
    window: int
    softcap: float


def attend_rows(query: Array, key: Array, value: Array, segment_ids: Array, *, scale: float, window: int = 0, softcap: float = 0.0) -> Array:
    """`attention.attend` under the mask of `attention.visibility`, which is never built for a long row. What a padded slot returns is finite.

    Args:
      query: [B, T, H, d].
      key, value: [B, T, G, d], G divides H.
      segment_ids: [B, T] int32.
      scale: of q·k.
      window: slots that a query sees, its own included; 0 = all.
      softcap: c; 0 = no cap.

    Returns:
      [B, T, H, d].
    """
    chex.assert_rank([query, key, value, segment_ids], [4, 4, 4, 2])
    chex.assert_equal_shape([key, value])
    chex.assert_equal_shape_prefix([query, key, segment_ids], 2)
    how = How(scale, window, softcap)
    key, value = (_copied(x, query.shape[2]) for x in (key, value))
    chosen = method(query, key, how)
    if chosen == "splash":
        return kernels.splash(query, key, value, segment_ids, **how._asdict())
    names = QUERIES, KEYS, KEYS, SLOTS
    if chosen == "cudnn":
        fused = functools.partial(kernels.cudnn, scale=scale, window=window)
        return partition.per_device(fused, (query, key, value, segment_ids), names, QUERIES, ())
    if partition.size("length") > 1:
        return partition.per_device(functools.partial(_gathered, how=how), (query, key, value, segment_ids), names, QUERIES, ("length",))
    return stairs(query, key, value, segment_ids, how) if chosen == "stairs" else blocks(query, key, value, segment_ids, 0, how)


def method(query: Array, key: Array, how: How) -> str:
    """Which implementation a call takes, as the table above names them; "blocks" is "whole" for rows of no more than a block.

    Args:
      query: [B, T, H, d].
      key: [B, T, G, d].
      how: the rest.
    """
    chex.assert_rank([query, key], 4)
    backend, length = platform(), query.shape[1]
    wanted = CAUSAL.get(backend, "blocks")
    divided = partition.divides(query.shape, QUERIES) and partition.divides(key.shape, KEYS)
    takes = {
        "splash": divided and kernels.splash_takes(query),
        "cudnn": divided and partition.size("length") == 1 and kernels.cudnn_takes(query, how.softcap),
        "stairs": length >= LONG and partition.size("length") == 1,
    }
    return wanted if takes.get(wanted, False) else "blocks"


def stairs(query: Array, key: Array, value: Array, segment_ids: Array, how: How, size: int = 0) -> Array:
    """Query blocks one after the other, each against the keys that it may see: half of the products, less under a window. Recomputing them in the
    backward pass frees nothing on a CPU, whose compiler orders the blocks as it likes.

    Args:
      query, key, value: as of `attend_rows`.
      segment_ids: [B, T] int32.
      how: the rest.
      size: queries of a block; 0 = STAIR, more in rows so long that there would be many.
    """
    chex.assert_rank([query, key, value, segment_ids], [4, 4, 4, 2])
    length = query.shape[1]
    size = size or max(STAIR, -(-length // 16))
    out = []
    for first in range(0, length, size):
        end = min(first + size, length)
        begin = max(0, first - how.window + 1) if how.window else 0
        of, to = slice(first, end), slice(begin, end)
        out.append(_whole(query[:, of], key[:, to], value[:, to], segment_ids[:, of], segment_ids[:, to], first, begin, how))
    return jnp.concatenate(out, axis=1)


def blocks(query: Array, key: Array, value: Array, segment_ids: Array, first: Array | int, how: How, size: int = BLOCK) -> Array:
    """Query blocks in a loop, each recomputed in the backward pass, against all keys or those of a window.

    Args:
      query: [B, Q, H, d], the slots from `first` on.
      key, value: [B, T, G, d].
      segment_ids: [B, T] int32.
      first: [] int32.
      how: the rest.
      size: queries of a block.

    Returns:
      [B, Q, H, d].
    """
    chex.assert_rank([query, key, value, segment_ids], [4, 4, 4, 2])
    (rows, queries), keys = query.shape[:2], key.shape[1]
    own = jax.lax.dynamic_slice_in_dim(segment_ids, first, queries, axis=1)
    if queries <= size:
        return _whole(query, key, value, own, segment_ids, first, 0, how)
    count = -(-queries // size)
    span = min(how.window + size - 1, keys) if how.window else keys
    pad = lambda x: jnp.pad(x, ((0, 0), (0, count * size - queries)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
    split = lambda x: pad(x).reshape(rows, count, size, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731

    def one(block: tuple[Array, Array, Array]) -> Array:
        number, mine, segments = block
        slot = first + number * size
        begin = jnp.clip(slot - how.window + 1, 0, keys - span) if span < keys else 0
        near = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, span, axis=1) if span < keys else x  # noqa: E731
        return _whole(mine, near(key), near(value), segments, near(segment_ids), slot, begin, how)

    out = jax.lax.map(jax.checkpoint(one), (jnp.arange(count), split(query), split(own)))
    return out.swapaxes(0, 1).reshape(rows, count * size, *query.shape[2:])[:, :queries]


def _whole(query: Array, key: Array, value: Array, of: Array, to: Array, first: Array | int, begin: Array | int, how: How) -> Array:
    """All logits at once: queries of the segments `of` from slot `first` on, keys of the segments `to` from slot `begin` on."""
    return attend(query, key, value, seen(of, to, first, begin, how.window), scale=how.scale, softcap=how.softcap)


def _gathered(query: Array, key: Array, value: Array, segment_ids: Array, how: How, axes: tuple[str, ...] = ()) -> Array:
    """On one device of the axis over which slots are spread: its queries, and everybody's keys and values."""
    if not axes:
        return blocks(query, key, value, segment_ids, 0, how)
    key, value = (jax.lax.all_gather(x, axes[0], axis=1, tiled=True) for x in (key, value))
    return blocks(query, key, value, segment_ids, jax.lax.axis_index(axes[0]) * query.shape[1], how)


def _copied(x: Array, heads: int) -> Array:
    """Keys or values with every head as often as the mesh has devices for it: where it has more of them than heads, each holds a copy of one."""
    devices, own = partition.size("kv_heads"), x.shape[2]
    return jnp.repeat(x, devices // own, axis=2) if own % devices and devices % own == 0 and heads % devices == 0 else x
