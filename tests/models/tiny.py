"""Small networks and rows for every test that needs a real model: hidden 16, two layers, seventeen tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from rlhf_jax.models import ModelConfig, Networks, NetworkSpec, transformer
from rlhf_jax.types import Array, PyTree, Sequences

V = 17
QUICK = {"xla_backend_optimization_level": 0}  # halves the time to compile; the partitioner and every HLO pass run as ever
jit = functools.partial(jax.jit, compiler_options=QUICK)
# Fused as outside the tests: where the compiled text is read, or the bits of two programs are compared.
SHIPPED = {**QUICK, "xla_cpu_use_fusion_emitters": True}
BASE = ModelConfig(
    vocab_size=V, hidden=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=24, context=64, rope_theta=100.0, norm_eps=1e-6, tied=False,
    dropout=0.0, param_dtype="float32", compute_dtype="float32", scan_layers=False, remat="none", logits_chunk=0,
)


def config(**changes: Any) -> ModelConfig:
    """BASE with other values."""
    return dataclasses.replace(BASE, **changes)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Programs of several devices are compiled afresh inside: on jax 0.10.2's CPU, one read back from the persistent cache may run its
    collectives in another order on one device than on the others, and all of them wait for ever."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@functools.cache
def params(config: ModelConfig = BASE, seed: int = 0) -> PyTree:
    """Parameters drawn by `init`, then every leaf moved by noise: gains are not 1, biases and value heads not 0."""
    with jax.ensure_compile_time_eval():  # kept, also when first asked for under a trace
        drawn = jit(transformer.init, static_argnums=0)(config, jax.random.key(seed))
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.normal(size=x.shape), x.dtype), drawn)


def nets(config: ModelConfig = BASE, *, seed: int = 0, **spec: Any) -> Networks:
    """A policy alone."""
    return Networks({"policy": params(config, seed)}, {}, NetworkSpec(policy=config, **spec))


def row(tokens: Any, *, left: int = 0, right: int = 0, lengths: tuple[int, ...] = (), fill: int = 0) -> Sequences:
    """One row [1, T]: `tokens`, in segments of the given lengths (one segment if none), with padding on both sides."""
    tokens = np.asarray(tokens)
    lengths = lengths or (len(tokens),)
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)])
    positions = np.concatenate([np.arange(n) for n in lengths])
    pad = lambda x, value: np.pad(x, (left, right), constant_values=value)[None].astype(np.int32)  # noqa: E731
    seqs = Sequences(tokens=pad(tokens, fill), positions=pad(positions, 0), segment_ids=pad(segments, 0), loss_mask=pad(segments, 0) != 0)
    return jax.tree.map(jnp.asarray, seqs)


def rows(batch: int, length: int, *, seed: int = 0, branches: int = 0, vocabulary: int = V) -> Sequences:
    """Random rows [B, T] or [B, K, T] with padding on both sides; the second of every four is packed of two segments."""
    rng = np.random.default_rng(seed)
    count = batch * max(branches, 1)
    made = []
    for number in range(count):
        left, right = rng.integers(0, 3, 2)
        size = length - left - right
        lengths = (size // 2, size - size // 2) if number % 4 == 1 else (size,)
        made.append(row(rng.integers(0, vocabulary, size), left=left, right=right, lengths=lengths, fill=rng.integers(0, vocabulary)))
    shape = (batch, branches, length) if branches else (batch, length)
    return jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x).reshape(shape)), *made)


@functools.partial(jit, static_argnums=0)
def logits(config: ModelConfig, params: PyTree, seqs: Sequences, keys: Array | None = None) -> Array:
    """[B, T, V], after each token."""
    return transformer.unembed(config, params, transformer.trunk(config, params, seqs.tokens, seqs.positions, seqs.segment_ids, keys))


def canonical(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves by path, as NumPy."""
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def close(a: PyTree, b: PyTree, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Every leaf of both trees is near the other's."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def near(a: PyTree, b: PyTree, relative: float = 1e-5) -> None:
    """The design's tolerance on gradients: ‖Δ‖ ≤ 1e-5 · ‖g‖ + 1e-8 per leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape and np.isfinite(y).all()
        gap, size = np.linalg.norm(x - y), np.linalg.norm(y)
        assert gap <= relative * size + 1e-8, f"{jax.tree_util.keystr(path)}: ‖Δ‖ = {gap:.3g}, ‖g‖ = {size:.3g}"
