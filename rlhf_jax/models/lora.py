"""Low-rank adapters: what a frozen kernel learns beside itself.

    y = x (W + s·A B),   A [in, r] drawn, B [r, out] zero at first;   s = α / r, or α / √r (rsLoRA)
    DoRA: y = x (W + s·A B) · m / ‖W + s·A B‖,   norms of columns, m [out] learnt, ‖W‖ at first; the norm is held fixed in the gradient

Fresh adapters change nothing. Training them is the ordinary split before `grad` (train/start.py): these leaves train, the rest is the frozen base,
and without them the same tree is the reference.

See: Hu et al. 2021 (arXiv:2106.09685); rsLoRA, Kalajdzievski 2023 (arXiv:2312.03732); DoRA, Liu et al. 2024 (arXiv:2402.09353), eq. 5 and 11.
Deviation: DoRA's dropout falls on the low-rank branch alone, where PEFT drops the input of the kernel's branch too; a column of zeros has m / ‖·‖ = 0
instead of 0 / 0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import quantise
from rlhf_jax.models.config import Lora, ModelConfig
from rlhf_jax.models.lazy import Lazy
from rlhf_jax.types import Array, PyTree

A, B, MAGNITUDE = LEAVES = ("lora_a", "lora_b", "magnitude")
TRAINABLE = r"/(lora_a|lora_b|magnitude)$"  # of canonical and running paths alike


def kernels(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Canonical paths of the projections that adapters may lie beside, and the shapes (in, out) of their kernels.

    Args:
      config: the network.
    """
    inside = {"query": config.heads, "key": config.kv_heads, "value": config.kv_heads}
    shapes = {name: (config.hidden, heads * config.head_dim) for name, heads in inside.items()}
    shapes["output"] = (config.heads * config.head_dim, config.hidden)
    dense = {"gate": (config.hidden, config.mlp)} if config.gated else {}
    dense |= {"up": (config.hidden, config.mlp), "down": (config.mlp, config.hidden)}
    return {f"layers/{i}/{name}": shape for i in range(config.layers)
            for name, shape in (shapes if config.kind(i)[1] else shapes | dense).items()}


def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """A's first values, uniform in ±1/√in, as PEFT draws them.

    Args:
      key: typed key, [].
      shape: (in, r).
      dtype: of the leaf.
    """
    chex.assert_rank(key, 0)
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def scale(settings: Lora) -> float:
    """s, what multiplies A B."""
    return settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)


def column_norms(kernel: Array | np.ndarray) -> Any:
    """‖W‖ of each column, [out] float32.

    Args:
      kernel: [in, out]; of NumPy, what comes back is NumPy's too.
    """
    chex.assert_rank(kernel, 2)
    if isinstance(kernel, np.ndarray):
        return np.sqrt(np.square(kernel.astype(np.float32)).sum(0, dtype=np.float64)).astype(np.float32)
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(0))


def updated(kernel: Array | np.ndarray, a: Array | np.ndarray, b: Array | np.ndarray, settings: Lora) -> Any:
    """W + s·A B, [in, out] float32.

    Args:
      kernel: [in, out].
      a: [in, r]; b: [r, out].
      settings: of the adapter.
    """
    chex.assert_rank([kernel, a, b], 2)
    return kernel.astype(np.float32) + scale(settings) * (a.astype(np.float32) @ b.astype(np.float32))


def column_factors(whole: Array | np.ndarray, magnitude: Array | np.ndarray) -> Any:
    """m / ‖W + s·A B‖, [out] float32; the norm carries no gradient (DoRA, §4.3).

    Args:
      whole: W + s·A B, [in, out].
      magnitude: m, [out].
    """
    chex.assert_rank([whole, magnitude], [2, 1])
    norms = column_norms(whole)
    if isinstance(norms, np.ndarray):
        return magnitude.astype(np.float32) / np.where(norms > 0, norms, np.float32(1))
    norms = jax.lax.stop_gradient(norms)
    return magnitude.astype(jnp.float32) / jnp.where(norms > 0, norms, 1.0)


def merged(tree: PyTree, settings: Lora) -> PyTree:
    """The same network without adapters, and unquantised: each kernel with its update added. Nothing is read; NumPy computes it when a leaf is.

    Args:
      tree: parameters, canonical; NumPy arrays, jax arrays, or not read yet.
      settings: of the adapter.

    Returns:
      The tree without adapters' leaves. Kernels keep their dtype; quantised ones come out in float32, with or without an adapter.
    """
    if not isinstance(tree, Mapping):
        return tree
    tree = quantise.dequantised(tree) if quantise.CODES in tree else tree
    if A not in tree:
        return {name: merged(node, settings) for name, node in tree.items()}
    kernel = Lazy.of(tree["kernel"])
    whole = Lazy(kernel.shape, kernel.dtype, (((), functools.partial(_merged, dict(tree), settings)),))
    return {"kernel": whole, **{name: leaf for name, leaf in tree.items() if name not in (*LEAVES, "kernel")}}


def _merged(leaves: Mapping[str, Any], settings: Lora) -> np.ndarray:
    kernel, a, b = (np.asarray(leaves[name]) for name in ("kernel", A, B))
    whole = updated(kernel, a, b, settings)
    if settings.dora:
        whole = whole * column_factors(whole, np.asarray(leaves[MAGNITUDE]))[None, :]
    return np.asarray(whole).astype(kernel.dtype)


def has_adapters(tree: PyTree) -> bool:
    """Whether any leaf of nested dicts is an adapter's."""
    return isinstance(tree, Mapping) and any(name in LEAVES or has_adapters(node) for name, node in tree.items())
