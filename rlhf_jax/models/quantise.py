"""Frozen kernels in fewer bits, dequantised where they are used.

    int8: W ≈ q · s, q in [−127, 127], s one per column = max |column| / 127                                    1 byte a weight
    nf4:  W ≈ level[q] · s, 16 levels at the quantiles of a normal distribution, s one per column and block of
          64 rows = max |block|; two codes to a byte                                                        0.5625 bytes a weight

A kernel's leaf `kernel` is replaced by `codes` and `scales`. Nothing differentiates them: a quantised network trains adapters (models/lora.py). The
backward pass dequantises again, so that no kernel is kept for it, and under FSDP the codes are gathered, not what they stand for.

See: Dettmers et al. 2023, §3 and appendix E (arXiv:2305.14314). Blocks are theirs, 64 weights of one output one after the other. Deviation: their
scales are not themselves quantised (0.0156 bytes a weight instead of 0.0625), and kernels whose rows do not come in 64s are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models.lazy import Lazy
from rlhf_jax.ops.partition import constrain
from rlhf_jax.types import Array, PyTree

CODES, SCALES = "codes", "scales"
BLOCK = 64  # rows that share a scale (nf4)
STEP = 1 << 20  # weights that are quantised at once
LEVELS = np.array([  # Dettmers et al. 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], np.float32)
Axes = tuple[str | None, ...]
GATHERED = "embed"  # the axis that FSDP shards


def leaves(kind: str, shape: tuple[int, int], axes: tuple[str | None, str | None]) -> dict[str, tuple[tuple[int, ...], Any, Axes]]:
    """Shape, dtype and logical axes of a quantised kernel's leaves. A mesh axis that divides the rows of `scales` splits no block.

    Args:
      kind: "int8" or "nf4".
      shape: (in, out) of the kernel.
      axes: its logical axes.

    Raises:
      UserError: nf4 does not divide the rows into blocks.
    """
    into, out = shape
    if kind == "int8":
        return {CODES: (shape, jnp.int8, axes), SCALES: ((1, out), jnp.float32, (None, axes[1]))}
    if into % BLOCK:
        raise UserError(f"config.lora.base = 'nf4' needs kernels whose rows come in blocks of {BLOCK}, and one has {into}: use 'int8'")
    return {CODES: ((into // 2, out), jnp.uint8, axes), SCALES: ((into // BLOCK, out), jnp.float32, axes)}


def read(parts: Mapping[str, Array | np.ndarray], dtype: Any) -> Any:
    """The kernel, [in, out].

    Args:
      parts: `codes` (int8, or nf4's pairs as uint8) and `scales`; of NumPy, what comes back is NumPy's too.
      dtype: of the result.
    """
    codes, scales = parts[CODES], parts[SCALES]
    chex.assert_rank([codes, scales], 2)
    if codes.dtype == np.int8:
        return (codes.astype(np.float32) * scales).astype(dtype)
    on_host = isinstance(codes, np.ndarray)
    stack = np.stack if on_host else jnp.stack
    pairs = stack([codes >> 4, codes & 15], axis=1).reshape(-1, BLOCK, codes.shape[1])  # the even row in the upper half
    # A lookup and not a tree of selections, whose constants XLA hoists out of the layer scan, broadcast (measured on a CPU: 16 float32 arrays of each
    # kernel's shape).
    levels = LEVELS[pairs] if on_host else jnp.asarray(LEVELS).at[pairs].get(mode="promise_in_bounds")
    return (levels * scales[:, None, :]).reshape(-1, codes.shape[1]).astype(dtype)


def multiply(x: Array, parts: Mapping[str, Array], axes: tuple[str | None, str | None], dtype: Any) -> Array:
    """x W, [..., out], W in x's dtype; its gradient is x's alone.

    Args:
      x: [..., in].
      parts: `codes` and `scales`.
      axes: the kernel's logical axes.
      dtype: of the result.
    """
    chex.assert_axis_dimension(x, -1, parts[CODES].shape[0] * (1 if parts[CODES].dtype == np.int8 else 2))

    # Recomputed in the backward pass: else every layer's kernel, dequantised, would be kept for it (measured: 4 of 5.6 bytes a weight).
    @jax.checkpoint
    def product(x: Array, parts: Mapping[str, Array]) -> Array:
        return jnp.matmul(x, whole(parts, axes, x.dtype), preferred_element_type=dtype)

    return product(x, dict(parts))


def whole(parts: Mapping[str, Array], axes: tuple[str | None, str | None], dtype: Any) -> Array:
    """`read`, of parts that FSDP has spread: they are gathered as codes.

    Args:
      parts: `codes` and `scales`.
      axes: the kernel's logical axes.
      dtype: of the result.
    """
    chex.assert_rank([parts[CODES], parts[SCALES]], 2)
    rows, columns = (None if axis == GATHERED else axis for axis in axes)
    blocks = rows if parts[SCALES].shape[0] > 1 else None
    return read({CODES: constrain(parts[CODES], (rows, columns)), SCALES: constrain(parts[SCALES], (blocks, columns))}, dtype)


def write(kernel: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """`codes` and `scales` of a kernel, on the host.

    Args:
      kernel: [in, out].
      kind: "int8" or "nf4".

    Raises:
      UserError: it holds an infinity or a NaN.
    """
    found = scales(kernel, kind)
    unit = np.where(found == 0, np.float32(1), found)
    if kind == "int8":
        return {CODES: np.concatenate([np.rint(slab / unit).astype(np.int8) for _, slab in _slabs(kernel)]), SCALES: found}
    return {CODES: np.concatenate([_nf4(slab, unit[at // BLOCK : (at + len(slab)) // BLOCK]) for at, slab in _slabs(kernel)]), SCALES: found}


def scales(kernel: np.ndarray, kind: str) -> np.ndarray:
    """`scales` alone, which cost a small part of the codes; arguments and errors as for `write`."""
    chex.assert_rank(kernel, 2)
    largest = [_largest(slab, BLOCK if kind == "nf4" else len(slab)) for _, slab in _slabs(kernel)]
    if not all(np.isfinite(part).all() for part in largest):
        raise UserError(f"config.lora.base = {kind!r}: a kernel of the checkpoint holds an infinity or a NaN, which cannot be quantised; use 'same'")
    whole = np.concatenate(largest)
    return whole if kind == "nf4" else whole.max(axis=0, keepdims=True) / np.float32(127)


def _slabs(kernel: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Whole blocks of rows in float32, each with its first row: float32 copies of a whole kernel would be many times it."""
    rows = BLOCK * max(1, STEP // (BLOCK * max(1, kernel.shape[1])))
    for start in range(0, len(kernel), rows):
        yield start, kernel[start : start + rows].astype(np.float32)


def _largest(slab: np.ndarray, block: int) -> np.ndarray:
    """max |·| of each column's blocks, [rows / block, out]."""
    return np.abs(slab).reshape(-1, block, slab.shape[1]).max(axis=1)


def _nf4(slab: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Codes of the nearest levels, two rows to one: [rows / 2, out]."""
    unit = slab.reshape(-1, BLOCK, slab.shape[1]) / unit[:, None, :]
    codes = np.zeros(unit.shape, np.uint8)
    for middle in (LEVELS[1:] + LEVELS[:-1]) / 2:
        codes += unit > middle
    codes = codes.reshape(slab.shape)
    return (codes[0::2] << 4) | codes[1::2]


def dequantised(tree: PyTree) -> PyTree:
    """The same tree with whole kernels in float32, not read yet.

    Args:
      tree: parameters, canonical; NumPy arrays, jax arrays, or not read yet.
    """
    if not isinstance(tree, Mapping):
        return tree
    if CODES not in tree:
        return {name: dequantised(node) for name, node in tree.items()}
    codes = tree[CODES]
    shape = (codes.shape[0] * (1 if codes.dtype == np.int8 else 2), codes.shape[1])
    kernel = Lazy(shape, np.dtype(np.float32), (((), functools.partial(_dequantised, codes, tree[SCALES])),))
    return {"kernel": kernel, **{name: leaf for name, leaf in tree.items() if name not in (CODES, SCALES)}}


def _dequantised(codes: Any, scales: Any) -> np.ndarray:
    return np.asarray(read({CODES: np.asarray(codes), SCALES: np.asarray(scales)}, np.float32))
