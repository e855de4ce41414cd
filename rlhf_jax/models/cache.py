"""What a sampler keeps of every layer: the keys and values of the tokens so far, how many of them, and in which precision.

A layer's cache is {"k": [B, G, d, C], "v": [B, G, C, d]}: as the sums of one query per row run over them. Slots are counted in time: what comes at
time t, the same in every row, goes into slot t mod C, one update in place. A layer with a window keeps no more slots than the window has (a ring: the
token that leaves the window is overwritten), every other one as many as the longest row. As int8 there are {"k_scale", "v_scale"} besides, one number
per row, head and slot, so that what is written never has to be scaled again; a token is quantised as it is written, and the prompt attends to its own
keys and values as they were.

    x ≈ q · s,  s = max |x| / 127 over a head's d features

Measured on CPU (16 rows, 192 slots, 4 heads of 32 features): a query attends in 0.29 of the time that it takes with slots before heads.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.models import attention, causal, layout
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.ops.partition import constrain
from rlhf_jax.types import Array, PyTree

Cache = PyTree  # of the layout of the parameters' layers
KINDS = ("same", "bfloat16", "int8")  # same: as the computation. (XLA's CPU updates bfloat16 by way of float32, the whole of it for every token.)
LARGEST = 127.0
SLOTS = {"k": -1, "k_scale": -1, "v": -2, "v_scale": -2}  # which axis they are


def empty(config: ModelConfig, batch: int, longest: int, *, kind: str = "same", ring: bool = False) -> Cache:
    """A cache of zeros in the layout of `config.unit`.

    Args:
      config: the network.
      batch: B, rows.
      longest: slots of the longest row.
      kind: one of KINDS.
      ring: whether layers with a window keep no more slots than it; no row may then go back in time.
    """
    dtype = jnp.dtype({"same": config.compute_dtype}.get(kind, kind))

    def layer(index: int) -> dict[str, Array]:
        window, _ = config.kind(index)
        slots, heads, features = min(window, longest) if ring and window else longest, config.kv_heads, config.head_dim
        kept = {"k": jnp.zeros((batch, heads, features, slots), dtype), "v": jnp.zeros((batch, heads, slots, features), dtype)}
        if kind == "int8":
            kept |= {"k_scale": jnp.zeros((batch, heads, 1, slots)), "v_scale": jnp.zeros((batch, heads, slots, 1))}
        return kept

    return layout.to_runtime({"layers": {str(i): layer(i) for i in range(config.layers)}}, config.unit)["layers"]


def attend(cache: Cache, query: Array, key: Array, value: Array, mask: Array | causal.Rows, slot: Array | int | None, window: int, *, scale: float,
           softcap: float) -> tuple[Array, Cache]:
    """Writes a layer's new keys and values, and lets the new tokens attend.

    Args:
      cache: of one layer.
      query: [B, T, H, d].
      key, value: [B, T, G, d].
      mask: [B, T, S] bool, which times 0 … S − 1 (mod S) each of the new tokens may see, windows apart; Rows without a slot.
      slot: [] int32, the time of the first of them. None: they are the first of their rows and see each other alone.
      window: of the layer; 0 = none.
      scale, softcap: as for attention.attend.

    Returns:
      [B, T, H, d] and the new cache.
    """
    chex.assert_rank([query, key, value], 4)
    slots, count = cache["k"].shape[-1], key.shape[1]
    new = {"k": key.transpose(0, 2, 3, 1), "v": value.swapaxes(1, 2)}
    new = _quantised(new) if "k_scale" in cache else new
    new = {name: constrain(x.astype(cache[name].dtype), ("batch", "kv_heads", None, None)) for name, x in new.items()}
    if isinstance(mask, causal.Rows):
        assert slot is None
        kept = {name: _last(x, slots, SLOTS[name]) for name, x in new.items()}
        h = causal.attend_rows(query, key, value, mask.segment_ids, window=window, scale=scale, softcap=softcap)
        return h, {name: _write(cache[name], x, 0, SLOTS[name]) for name, x in kept.items()}
    chex.assert_rank(mask, 3)
    assert slot is not None
    times = mask.shape[2]
    if count > 1 and slots < times:
        raise AssertionError(f"{count} tokens at once do not go into a ring of {slots} slots that is not empty")
    chex.assert_equal(slots, times if slots >= times else min(window, times))
    cache = {name: _write(cache[name], x, slot % slots, SLOTS[name]) for name, x in new.items()}
    if slots < times:
        age = (slot - jnp.arange(slots)) % slots
        mask = jnp.take(mask, (slot - age) % times, axis=2)
    elif window < times:
        mask = attention.within(mask, slot, window)
    return attention.attend_cache(query, _read(cache, "k"), _read(cache, "v"), mask, scale=scale, softcap=softcap), cache


def length(cache: Cache) -> int:
    """Slots of a cache without rings.

    Args:
      cache: of all layers.
    """
    path, leaf = jax.tree_util.tree_leaves_with_path(cache)[0]
    return leaf.shape[SLOTS[path[-1].key]]


def later(cache: Cache, by: Array | int) -> Cache:
    """As if everything had come `by` steps later.

    Args:
      cache: of all layers.
      by: [] int32.
    """
    chex.assert_rank(by, 0)
    return jax.tree_util.tree_map_with_path(lambda path, x: jnp.roll(x, by, axis=SLOTS[path[-1].key]), cache)


def _last(x: Array, slots: int, axis: int) -> Array:
    """The last `slots` of what came at times 0, 1 …, each where it belongs; all of it where it is no more."""
    count = x.shape[axis]
    return x if count <= slots else jnp.roll(jax.lax.slice_in_dim(x, count - slots, count, axis=x.ndim + axis), count % slots, axis=axis)


def _write(into: Array, x: Array, slot: Array | int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(into, x, slot, axis=into.ndim + axis)


def _read(cache: Cache, name: str) -> Array:
    return cache[name].astype(jnp.float32) * cache[f"{name}_scale"] if f"{name}_scale" in cache else cache[name]


def _quantised(new: dict[str, Array]) -> dict[str, Array]:
    parts: dict[str, Array] = {}
    for name, x in new.items():
        scale = jnp.abs(x.astype(jnp.float32)).max({"k": 2, "v": 3}[name], keepdims=True) / LARGEST
        parts |= {name: jnp.round(x.astype(jnp.float32) / jnp.where(scale == 0, 1.0, scale)), f"{name}_scale": scale}
    return parts
