"""What a sampler keeps of every layer: the keys and values of the tokens so far, how many of them, and in which precision.

A layer's cache is {"k", "v"}, [B, C, G, d] each. Slots are counted in time: what comes at time t, the same in every row, goes into slot t mod C, one
update in place. A layer with a window keeps no more slots than the window has (a ring: the token that leaves the window is overwritten), every other
one as many as the longest row. As int8 there are {"k_scale", "v_scale"} besides, one number per row, slot and head, so that what is written never has
to be scaled again; a token is quantised as it is written, and the prompt attends to its own keys and values as they were.

    x ≈ q · s,  s = max |x| / 127 over a head's d features
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.models import layout
from rlhf_jax.models.attention import within
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.ops.partition import constrain
from rlhf_jax.types import Array, PyTree

Cache = PyTree  # of the layout of the parameters' layers
KINDS = ("same", "bfloat16", "int8")  # same: as the computation. (XLA's CPU updates bfloat16 by way of float32, the whole of it for every token.)
LARGEST = 127.0


def empty(config: ModelConfig, batch: int, length: int, *, kind: str = "same", ring: bool = False) -> Cache:
    """A cache of zeros in the layout of `config.unit`.

    Args:
      config: the network.
      batch: B, rows.
      length: slots of the longest row.
      kind: one of KINDS.
      ring: whether layers with a window keep no more slots than it; no row may then go back in time.
    """
    dtype = jnp.dtype({"same": config.compute_dtype}.get(kind, kind))

    def layer(index: int) -> dict[str, Array]:
        window, _ = config.kind(index)
        shape = (batch, min(window, length) if ring and window else length, config.kv_heads)
        names = ("k", "v") if kind != "int8" else ("k", "v", "k_scale", "v_scale")
        return {name: jnp.zeros((*shape, 1), jnp.float32) if "_" in name else jnp.zeros((*shape, config.head_dim), dtype) for name in names}

    return layout.to_runtime({"layers": {str(i): layer(i) for i in range(config.layers)}}, config.unit)["layers"]


def extend(cache: Cache, key: Array, value: Array, mask: Array, slot: Array | int | None, window: int) -> tuple[Array, Array, Array, Cache]:
    """Writes a layer's new keys and values, and says what the new tokens attend to.

    Args:
      cache: of one layer.
      key, value: [B, T, G, d].
      mask: [B, T, S] bool, which times 0 … S − 1 (mod S) each of the new tokens may see, windows apart; [B, T, T] without a slot.
      slot: [] int32, the time of the first of them. None: they are the first of their rows and see each other alone.
      window: of the layer; 0 = none.

    Returns:
      keys and values [B, C, G, d], the mask [B, T, C] over them, and the new cache.
    """
    chex.assert_rank([key, value, mask], [4, 4, 3])
    new = _quantised(key, value) if "k_scale" in cache else {"k": key, "v": value}
    new = {name: constrain(x.astype(cache[name].dtype), ("batch", None, "kv_heads", None)) for name, x in new.items()}
    slots, length = cache["k"].shape[1], key.shape[1]
    if slot is None:
        chex.assert_shape(mask, (key.shape[0], length, length))
        kept = {name: x if length <= slots else jnp.roll(x[:, length - slots :], length % slots, axis=1) for name, x in new.items()}
        return key, value, within(mask, 0, window), {name: _write(cache[name], x, 0) for name, x in kept.items()}
    times = mask.shape[2]
    if length > 1 and slots < times:
        raise AssertionError(f"{length} tokens at once do not go into a ring of {slots} slots that is not empty")
    chex.assert_equal(slots, times if slots >= times else min(window, times))
    cache = {name: _write(cache[name], x, slot % slots) for name, x in new.items()}
    if slots < times:
        age = (slot - jnp.arange(slots)) % slots
        mask = jnp.take(mask, (slot - age) % times, axis=2)
    elif window < times:
        mask = within(mask, slot, window)
    read = {name: _read(cache, name).astype(key.dtype) for name in ("k", "v")}
    return read["k"], read["v"], mask, cache


def _write(into: Array, x: Array, slot: Array | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(into, x, slot, axis=1)


def _read(cache: Cache, name: str) -> Array:
    return cache[name].astype(jnp.float32) * cache[f"{name}_scale"] if f"{name}_scale" in cache else cache[name]


def _quantised(key: Array, value: Array) -> dict[str, Array]:
    parts: dict[str, Array] = {}
    for name, x in (("k", key.astype(jnp.float32)), ("v", value.astype(jnp.float32))):
        scale = jnp.abs(x).max(-1, keepdims=True) / LARGEST
        parts |= {name: jnp.round(x / jnp.where(scale == 0, 1.0, scale)), f"{name}_scale": scale}
    return parts
