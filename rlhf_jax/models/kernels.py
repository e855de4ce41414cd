"""The fused attentions of JAX and of a vendor, for whole rows of packed segments: what they take, and how they are called.

Both see padding as a segment of its own, so that no query is without a key; nobody reads what comes out there.

See: jax.experimental.pallas.ops.tpu.splash_attention; jax.nn.dot_product_attention.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.ops import partition
from rlhf_jax.types import Array

LANES = 128  # of a TPU's vector unit: slots come in multiples of it
TILES = (512, 384, 256, 128)  # slots of a block of splash attention: the largest that divides a row
HEAD, MASKED = 128, 4096  # the widest head on every GPU that has cuDNN's kernel; slots of a row whose segment mask, T² numbers, cuDNN is given
QUERIES, KEYS = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)


def splash_takes(query: Array) -> bool:
    """Whether splash attention serves such queries.

    Args:
      query: [B, T, H, d].
    """
    chex.assert_rank(query, 4)
    return query.shape[1] >= LANES and query.dtype in (jnp.bfloat16, jnp.float32)


def splash(query: Array, key: Array, value: Array, segment_ids: Array, *, scale: float, window: int, softcap: float, interpret: bool = False
           ) -> Array:
    """Splash attention on every device for its rows, heads and slots. Rows are padded to whole blocks, and queries are scaled before the kernel.

    Args:
      query: [B, T, H, d].
      key, value: [B, T, G, d].
      segment_ids: [B, T] int32.
      scale, window, softcap: as of causal.attend_rows.
      interpret: run the kernel's program on any platform, slowly.

    Returns:
      [B, T, H, d].
    """
    chex.assert_rank([query, key, value, segment_ids], [4, 4, 4, 2])
    from jax.experimental.pallas.ops.tpu import splash_attention  # takes a moment to import, on a TPU alone

    mesh, spec, length, spread = partition.mesh(), partition.spec, query.shape[1], partition.size("length")
    along = None if mesh is None else spec(("length",))[0]
    unit = LANES * spread
    padded = -(-length // unit) * unit
    pad = lambda x: jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
    tile = next(size for size in TILES if padded // spread % size == 0)
    kernel = _kernel(query.shape[2] // partition.size("heads"), padded, tile, window, softcap, spread, interpret)

    def local(kernel: Any, q: Array, k: Array, v: Array, own: Array, all_ids: Array) -> Array:
        head_first = lambda x: x.swapaxes(1, 2)  # noqa: E731
        if spread > 1:
            k, v = (jax.lax.all_gather(x, along, axis=1, tiled=True) for x in (k, v))
        scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
        row = lambda q, k, v, own, ids: kernel(q, k, v, splash_attention.SegmentIds(q=own, kv=ids))  # noqa: E731
        out: Array = jax.vmap(row)(head_first(scaled), head_first(k), head_first(v), own, all_ids)
        return head_first(out).astype(q.dtype)

    args = pad(query), pad(key), pad(value), pad(segment_ids), pad(segment_ids)
    if mesh is None:
        return local(kernel, *args)[:, :length]
    tables = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, along)))
    specs = (tables, *map(spec, (QUERIES, KEYS, KEYS, ("batch", "length"), ("batch", None))))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec(QUERIES), check_vma=False)(kernel, *args)[:, :length]


@functools.lru_cache
def _kernel(heads: int, length: int, tile: int, window: int, softcap: float, spread: int, interpret: bool) -> Any:
    """The kernel, whose tables of visible blocks are constants of the program."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    shape = length, length
    one = splash_attention.LocalMask(shape, (window - 1, 0), 0) if window else splash_attention.CausalMask(shape)
    sizes = splash_attention.BlockSizes(
        block_q=tile, block_kv=tile, block_kv_compute=tile, block_q_dkv=tile, block_kv_dkv=tile, block_kv_dkv_compute=tile,
        block_q_dq=tile, block_kv_dq=tile,
    )
    with jax.ensure_compile_time_eval():
        return splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([one] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=spread,
            attn_logits_soft_cap=softcap or None, interpret=interpret,
        )


def cudnn_takes(query: Array, softcap: float) -> bool:
    """Whether cuDNN's attention serves such queries.

    Args:
      query: [B, T, H, d].
      softcap: of the logits; it has none.
    """
    chex.assert_rank(query, 4)
    (_, length, _, dim), half = query.shape, query.dtype in (jnp.bfloat16, jnp.float16)
    return half and not softcap and dim <= HEAD and dim % 8 == 0 and length % 2 == 0 and length <= MASKED


def cudnn(query: Array, key: Array, value: Array, segment_ids: Array, *, scale: float, window: int) -> Array:
    """cuDNN's fused attention, which leaves out what lies behind a query or before its window; segments are a mask of [B, 1, T, T] beside it.

    Args:
      query: [B, T, H, d], float16 or bfloat16.
      key, value: [B, T, G, d].
      segment_ids: [B, T] int32.
      scale, window: as of causal.attend_rows.

    Returns:
      [B, T, H, d].
    """
    chex.assert_rank([query, key, value, segment_ids], [4, 4, 4, 2])
    same = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    near = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(query, key, value, mask=same, scale=scale, is_causal=True, local_window_size=near, implementation="cudnn")
