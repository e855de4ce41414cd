"""What the networks are built of: linear maps with their adapters, norms, dropout whose draws belong to rows.

Deviation from Linen's own layers: kernels are drawn fan-in scaled, dropout takes a key per row, norms are computed in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models import lora, quantise
from rlhf_jax.models.config import Lora, ModelConfig
from rlhf_jax.ops import masking
from rlhf_jax.ops.partition import constrain, even
from rlhf_jax.types import Array

NOISE = 2**31 - 1  # salt of the embeddings' noise
ADAPTERS = 2**30  # salts of the adapters' dropouts begin here; those of the residual branches count up from 0
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=False), "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def logical(init: Any, *names: str | None) -> Any:
    """An initializer whose parameter carries logical axis names."""
    return nn.with_logical_partitioning(init, names)


def pin(x: Array) -> Array:
    """Keeps the residual stream [B, T, D] sharded over rows, and over slots where the devices divide them; a no-op without axis rules."""
    chex.assert_rank(x, 3)
    return constrain(x, ("batch", even("length", x.shape[1]), None))


def along_last(vector: Array, rank: int) -> Array:
    """[D] → [1, …, 1, D]: ranks are promoted in the open only."""
    chex.assert_rank(vector, 1)
    return vector.reshape((1,) * (rank - 1) + vector.shape)


class Linear(nn.Module):
    """y = x W (+ b), W [in, out], with the adapter and the quantisation that `config` asks for."""

    config: ModelConfig
    features: int
    axes: tuple[str | None, str | None]
    scale: float = 1.0
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array, keys: Array | None = None, salt: Array | int = 0) -> Array:
        c = self.config
        dtype, param_dtype = jnp.dtype(c.compute_dtype), jnp.dtype(c.param_dtype)
        shape = (x.shape[-1], self.features)
        x = x.astype(dtype)
        settings = c.lora if c.lora is not None and self.name in c.lora.projections else None
        wide = jnp.dtype(jnp.float32) if settings is not None and settings.dora else dtype  # what DoRA's factors multiply
        if c.quantise == "none":
            std = self.scale * x.shape[-1] ** -0.5
            kernel = self.param("kernel", logical(nn.initializers.normal(std), *self.axes), shape, param_dtype).astype(dtype)
            y = jnp.matmul(x, kernel, preferred_element_type=wide)
        else:
            parts = {name: self.param(name, logical(nn.initializers.zeros, *axes), size, kind)
                     for name, (size, kind, axes) in quantise.leaves(c.quantise, shape, self.axes).items()}
            y = quantise.multiply(x, parts, self.axes, wide)
            kernel = quantise.whole(parts, self.axes, dtype)  # read by DoRA alone
        if settings is not None:
            y = self._adapted(x, y, kernel, settings, keys, salt).astype(dtype)
        if self.bias:
            bias = self.param("bias", logical(nn.initializers.zeros, self.axes[1]), (self.features,), param_dtype)
            y = y + along_last(bias.astype(y.dtype), y.ndim)
        return y

    def _adapted(self, x: Array, y: Array, kernel: Array, settings: Lora, keys: Array | None, salt: Array | int) -> Array:
        """`y` with the low-rank update, whose leaves lie beside the kernel."""
        param_dtype, (into, out) = jnp.dtype(self.config.param_dtype), self.axes
        a = self.param("lora_a", logical(lora.draw, into, None), (kernel.shape[0], settings.rank), param_dtype)
        b = self.param("lora_b", logical(nn.initializers.zeros, None, out), (settings.rank, self.features), param_dtype)
        low = drop(x, keys, ADAPTERS + salt, settings.dropout) if x.ndim == 3 else x
        update = lora.scale(settings) * ((low @ a.astype(x.dtype)) @ b.astype(x.dtype))
        if not settings.dora:
            return y + update
        magnitude = self.param("magnitude", logical(lambda *_: lora.column_norms(kernel), out), (self.features,), jnp.float32)
        # In float32: bfloat16 has no numbers between 1 and 1.0078, and factors begin at 1 and move little.
        factors = lora.column_factors(lora.updated(*jax.lax.stop_gradient((kernel, a, b)), settings), magnitude)
        return (y + update) * along_last(factors, y.ndim)


class Norm(nn.Module):
    """RMSNorm x / √(mean x² + ε) · g, or LayerNorm (x − mean x) / √(var x + ε) · g + b, computed in float32.

    See: Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4; Ba et al. 2016 (arXiv:1607.06450).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        param_dtype = jnp.dtype(c.param_dtype)
        neutral = nn.initializers.zeros if c.norm_offset else nn.initializers.ones
        gain = self.param("scale", logical(neutral, "norm"), (x.shape[-1],), param_dtype).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        if c.norm == "layer":
            wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + c.norm_eps)
        wide = wide * along_last(1.0 + gain if c.norm_offset else gain, x.ndim)
        if c.norm == "layer":
            bias = self.param("bias", logical(nn.initializers.zeros, "norm"), (x.shape[-1],), param_dtype)
            wide = wide + along_last(bias.astype(jnp.float32), x.ndim)
        return wide.astype(x.dtype)


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
