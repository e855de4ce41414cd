"""One decoder-only transformer in Flax Linen, used through pure functions on plain dict trees.

`init` draws the parameters, `trunk` maps tokens to hidden states, `prefill` and `decode` do the same with an explicit KV cache, and
`unembed` maps hidden states to logits. Attention sees earlier tokens of the same segment only (law 2); a pad is never attended. Llama's
architecture (Touvron et al. 2023) with grouped-query attention (Ainslie et al. 2023). Deviation: kernels are drawn fan-in scaled and
residual outputs by a further 1/√(2·layers), so that models of 0.1 M parameters train from scratch.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from rlhf_jax.models import layout
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.ops import masking
from rlhf_jax.ops.partition import constrain
from rlhf_jax.types import Array, PyTree

NOISE = 2**31 - 1  # salt of the embeddings' noise; dropouts count up from 0
Cache = Any  # per layer {"k", "v"} [B, S, kv_heads, head_dim]; stacked on a leading axis when layers are scanned


def _logical(init: Any, *names: str | None) -> Any:
    return nn.with_logical_partitioning(init, names)


def pin(x: Array) -> Array:
    """Keeps the residual stream [B, T, D] sharded over rows only; a no-op without axis rules."""
    chex.assert_rank(x, 3)
    return constrain(x, ("batch",) + (None,) * (x.ndim - 1))


def _along_last(vector: Array, rank: int) -> Array:
    """[D] → [1, …, 1, D]: ranks are promoted in the open only."""
    return vector.reshape((1,) * (rank - 1) + vector.shape)


class Linear(nn.Module):
    """y = x W (+ b), W [in, out]."""

    features: int
    axes: tuple[str | None, str | None]
    scale: float = 1.0
    bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        std = self.scale * x.shape[-1] ** -0.5
        kernel = self.param("kernel", _logical(nn.initializers.normal(std), *self.axes), (x.shape[-1], self.features), self.param_dtype)
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.bias:
            bias = self.param("bias", _logical(nn.initializers.zeros, self.axes[1]), (self.features,), self.param_dtype)
            y = y + _along_last(bias.astype(y.dtype), y.ndim)
        return y


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · g, computed in float32."""

    eps: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gain = self.param("scale", _logical(nn.initializers.ones, "norm"), (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * _along_last(gain.astype(jnp.float32), x.ndim)).astype(x.dtype)


def rope_tables(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin of p·θ^(−2i/d), each [B, T, 1, head_dim/2] float32. See: Su et al. 2021 (arXiv:2104.09864), eq. 15.

    Args:
      positions: [B, T] int32.
      head_dim: features of a head, even.
      theta: base of the frequencies.
    """
    chex.assert_rank(positions, 2)
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)  # [d/2]
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the feature pairs (i, i + d/2), Llama's convention.

    Args:
      x: [B, T, H, d].
      cos, sin: [B, T, 1, d/2] float32.
    """
    chex.assert_rank([x, cos, sin], 4)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """softmax(q kᵀ / √d) v with grouped heads; float32 softmax. A query that may see nothing returns finite values that nobody reads.

    Args:
      query: [B, T, H, d].
      key, value: [B, S, G, d], G divides H.
      mask: [B, T, S] bool, True where a query may see a key.

    Returns:
      [B, T, H, d].
    """
    chex.assert_rank([query, key, value], 4)
    chex.assert_equal_shape([key, value])
    chex.assert_shape(mask, (query.shape[0], query.shape[1], key.shape[1]))
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], dim)
    logits = jnp.einsum("btghd,bsgd->bghts", grouped, key, preferred_element_type=jnp.float32) * dim**-0.5
    logits = jnp.where(mask[:, None, None, :, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bghts,bsgd->btghd", weights, value).reshape(batch, length, heads, dim)


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


def drop(x: Array, keys: Array | None, salt: Array | int, rate: float) -> Array:
    """Dropout whose mask depends on the row's key and `salt` alone, so that splitting a batch changes nothing.

    Args:
      x: [B, T, D].
      keys: [B] typed keys; None = no dropout.
      salt: which of the network's dropouts this is.
      rate: share dropped.
    """
    chex.assert_rank(x, 3)
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, salt), 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def perturb(x: Array, segment_ids: Array, keys: Array | None, alpha: float) -> Array:
    """x + α / √(L·D) · Uniform(−1, 1), L the tokens of the own segment: NEFTune's noise on the embeddings. Padding gets none.

    Args:
      x: [B, T, D].
      segment_ids: [B, T] int32.
      keys: [B] typed keys, of which alone a row's draw depends; None = no noise.
      alpha: α, ≥ 0; 0 = no noise.

    See: Jain et al. 2023, algorithm 1 (arXiv:2310.05914).
    """
    chex.assert_rank([x, segment_ids], [3, 2])
    chex.assert_equal_shape_prefix([x, segment_ids], 2)
    if keys is None or alpha == 0.0:
        return x
    draw = lambda key: jax.random.uniform(jax.random.fold_in(key, NOISE), x.shape[1:], minval=-1.0, maxval=1.0)  # noqa: E731
    length = masking.segment_sum(jnp.ones(segment_ids.shape), segment_ids)
    scale = jnp.where(segment_ids != 0, alpha * jax.lax.rsqrt(jnp.maximum(length, 1.0) * x.shape[-1]), 0.0)
    return (x.astype(jnp.float32) + scale[:, :, None] * jax.vmap(draw)(keys)).astype(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Array, cos: Array, sin: Array, mask: Array, keys: Array | None = None, index: Array | int = 0,
        cache: Cache | None = None, slot: Array | int = 0,
    ) -> tuple[Array, Cache | None]:
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=jnp.dtype(c.compute_dtype), param_dtype=jnp.dtype(c.param_dtype))
        norm = functools.partial(RMSNorm, c.norm_eps, jnp.dtype(c.param_dtype))
        out_scale = (2 * c.layers) ** -0.5
        batch, length, _ = x.shape

        h = norm(name="attention_norm")(x)
        query = Linear(c.heads * c.head_dim, ("embed", "heads"), name="query", **dtypes)(h).reshape(batch, length, c.heads, c.head_dim)
        key = Linear(c.kv_heads * c.head_dim, ("embed", "kv_heads"), name="key", **dtypes)(h)
        value = Linear(c.kv_heads * c.head_dim, ("embed", "kv_heads"), name="value", **dtypes)(h)
        key, value = (y.reshape(batch, length, c.kv_heads, c.head_dim) for y in (key, value))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
            cache = {"k": write(cache["k"], key), "v": write(cache["v"], value)}
            key, value = cache["k"], cache["v"]
        h = attend(query, key, value, mask).reshape(batch, length, c.heads * c.head_dim)
        h = Linear(c.hidden, ("heads", "embed"), out_scale, name="output", **dtypes)(h)
        x = pin(x + drop(h, keys, 2 * index + 1, c.dropout))

        h = norm(name="mlp_norm")(x)
        gate = Linear(c.mlp, ("embed", "mlp"), name="gate", **dtypes)(h)
        up = Linear(c.mlp, ("embed", "mlp"), name="up", **dtypes)(h)
        h = Linear(c.hidden, ("mlp", "embed"), out_scale, name="down", **dtypes)(jax.nn.silu(gate) * up)
        return pin(x + drop(h, keys, 2 * index + 2, c.dropout)), cache


class Ends(nn.Module):
    """Everything outside the layers: embedding table, final norm, and the heads this network has."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        embed = _logical(nn.initializers.normal(c.hidden**-0.5), "vocab", "embed")
        self.embedding = self.param("embedding", embed, (c.vocab_size, c.hidden), dtype)
        self.norm = RMSNorm(c.norm_eps, dtype)
        if "lm" in c.outputs and not c.tied:
            self.lm_head = self.param("lm_head", _logical(nn.initializers.normal(c.hidden**-0.5), "embed", "vocab"), (c.hidden, c.vocab_size), dtype)
        # A reward head starts at std 1/√(d+1) (Stiennon et al. 2020), a value head at V = 0.
        if "score" in c.outputs:
            self.score_head = Linear(1, ("embed", None), (c.hidden / (c.hidden + 1)) ** 0.5, bias=True, param_dtype=dtype)
        if "value" in c.outputs:
            self.value_head = Linear(1, ("embed", None), 0.0, bias=True, param_dtype=dtype)

    def embed(self, tokens: Array) -> Array:
        """The table is gathered before the lookup: an FSDP-sharded lookup would cost an all-to-all per step."""
        table = constrain(self.embedding, (None, None))
        return pin(table[tokens].astype(jnp.dtype(self.config.compute_dtype)))

    def finish(self, x: Array) -> Array:
        return self.norm(x)

    def unembed(self, hidden: Array) -> Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        matrix = self.embedding.T if self.config.tied else self.lm_head
        return jnp.matmul(hidden.astype(dtype), matrix.astype(dtype), preferred_element_type=jnp.float32)

    def scalar(self, hidden: Array, head: str) -> Array:
        return getattr(self, f"{head}_head")(hidden.astype(jnp.float32))[..., 0]

    def __call__(self, tokens: Array) -> Array:
        """Touches every parameter, for init."""
        h = self.finish(self.embed(tokens))
        outs = [self.unembed(h).sum()] if "lm" in self.config.outputs else []
        return sum(outs + [self.scalar(h, head).sum() for head in ("score", "value") if head in self.config.outputs], jnp.float32(0))


def _ends(config: ModelConfig, params: PyTree, method: str, *args: Any) -> Any:
    return Ends(config).apply({"params": params["ends"]}, *args, method=method)


def _boxed(config: ModelConfig, key: Array) -> PyTree:
    tokens = jnp.zeros((1, 2), jnp.int32)
    cos, sin = rope_tables(tokens, config.head_dim, config.rope_theta)
    x = jnp.zeros((1, 2, config.hidden), jnp.dtype(config.compute_dtype))
    layers = {
        str(i): Block(config).init(jax.random.fold_in(key, i + 1), x, cos, sin, visibility(tokens + 1))["params"]
        for i in range(config.layers)
    }
    return {"ends": Ends(config).init(jax.random.fold_in(key, 0), tokens)["params"], "layers": layers}


def init(config: ModelConfig, key: Array) -> PyTree:
    """Fresh parameters in the layout of `config.scan_layers`. Layer i's draw depends on (key, i) alone.

    Args:
      config: the network.
      key: typed key, [].
    """
    chex.assert_rank(key, 0)
    return layout.to_runtime(meta.unbox(_boxed(config, key)), config.scan_layers)


def logical_axes(config: ModelConfig) -> PyTree:
    """The parameters' tree with a tuple of logical axis names at each leaf."""
    boxed = jax.eval_shape(functools.partial(_boxed, config), jax.random.key(0))
    names = jax.tree.map(lambda b: layout.Axes(b.names), boxed, is_leaf=lambda b: isinstance(b, meta.AxisMetadata))
    return layout.axes_to_runtime(names, config.scan_layers)


def _layers(config: ModelConfig, params: PyTree, x: Array, cos: Array, sin: Array, mask: Array, keys: Array | None,
            cache: Cache | None, slot: Array | int) -> tuple[Array, Cache | None]:
    """The stack of blocks, unrolled or scanned; the cache goes along as scan inputs and outputs."""

    def apply(x: Array, layer: PyTree, index: Array | int, cache: Cache | None) -> tuple[Array, Cache | None]:
        return Block(config).apply({"params": layer}, x, cos, sin, mask, keys, index, cache, slot)

    if config.remat == "full":
        apply = jax.checkpoint(apply)
    elif config.remat == "dots":
        apply = jax.checkpoint(apply, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)

    if not config.scan_layers:
        new_cache = {}
        for i in range(config.layers):
            x, new_cache[str(i)] = apply(x, params["layers"][str(i)], i, None if cache is None else cache[str(i)])
        return x, None if cache is None else new_cache

    def body(x: Array, inputs: Any) -> tuple[Array, Cache | None]:
        layer, index, layer_cache = inputs
        return apply(x, layer, index, layer_cache)

    return jax.lax.scan(body, x, (params["layers"][layout.SCAN], jnp.arange(config.layers), cache))


def trunk(config: ModelConfig, params: PyTree, tokens: Array, positions: Array, segment_ids: Array, keys: Array | None = None,
          noise: float = 0.0) -> Array:
    """Final hidden states, [B, T, D].

    Args:
      config: the network.
      params: its parameters.
      tokens, positions, segment_ids: [B, T] int32.
      keys: [B] typed keys for dropout and noise, or None.
      noise: α of `perturb`, which comes before dropout.
    """
    chex.assert_rank([tokens, positions, segment_ids], 2)
    chex.assert_equal_shape([tokens, positions, segment_ids])
    x = perturb(_ends(config, params, "embed", tokens), segment_ids, keys, noise)
    x = drop(x, keys, 0, config.dropout)
    cos, sin = rope_tables(positions, config.head_dim, config.rope_theta)
    x, _ = _layers(config, params, x, cos, sin, visibility(segment_ids), keys, None, 0)
    return pin(_ends(config, params, "finish", x))


def unembed(config: ModelConfig, params: PyTree, hidden: Array) -> Array:
    """Logits [..., V] float32.

    Args:
      config: the network.
      params: its parameters.
      hidden: [..., D] final hidden states.
    """
    chex.assert_axis_dimension(hidden, -1, config.hidden)
    return _ends(config, params, "unembed", hidden)


def scalar(config: ModelConfig, params: PyTree, hidden: Array, head: str) -> Array:
    """A scalar head's reading of each hidden state, [...] float32.

    Args:
      config: the network.
      params: its parameters.
      hidden: [..., D].
      head: "value" or "score".
    """
    chex.assert_axis_dimension(hidden, -1, config.hidden)
    return _ends(config, params, "scalar", hidden, head)


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """A KV cache of zeros for `batch` rows of `length` slots, in the layout of `config.scan_layers`."""
    shape = (batch, length, config.kv_heads, config.head_dim)
    dtype = jnp.dtype(config.compute_dtype)
    if config.scan_layers:
        return {name: jnp.zeros((config.layers, *shape), dtype) for name in ("k", "v")}
    return {str(i): {name: jnp.zeros(shape, dtype) for name in ("k", "v")} for i in range(config.layers)}


def cached(config: ModelConfig, params: PyTree, tokens: Array, positions: Array, mask: Array, cache: Cache, slot: Array | int
           ) -> tuple[Array, Cache]:
    """Hidden states of `tokens`, written into the cache's slots `slot…slot+T`; the rest as `trunk`.

    Args:
      config: the network.
      params: its parameters.
      tokens, positions: [B, T] int32; T = prompt for prefill, 1 for a decode step.
      mask: [B, T, S] bool, which of the cache's S slots each query may see.
      cache: as from `empty_cache`.
      slot: [] int32, where the first token is written.

    Returns:
      hidden [B, T, D] and the new cache.
    """
    chex.assert_rank([tokens, positions], 2)
    chex.assert_equal_shape([tokens, positions])
    chex.assert_rank(mask, 3)
    x = _ends(config, params, "embed", tokens)
    cos, sin = rope_tables(positions, config.head_dim, config.rope_theta)
    x, cache = _layers(config, params, x, cos, sin, mask, None, cache, slot)
    return _ends(config, params, "finish", x), cache
