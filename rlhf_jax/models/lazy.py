"""A parameter that is not read yet: its shape, its dtype, and how to read the pieces that fill it.

A checkpoint's tree holds these in place of arrays, so that a network is placed tensor by tensor straight onto its shards (sharding.place) and no
more than one tensor lies on the host. `np.asarray` reads one whole. Pieces are what a parameter is stacked of: experts, and the layers of a scan.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

Piece = tuple[tuple[int, ...], Callable[[], np.ndarray]]  # where it lies along the leading axes, and what reads it


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """A parameter on disk, or parts of it wherever they are."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Piece, ...]  # ((), read) for one that is read whole

    @classmethod
    def of(cls, leaf: Any) -> Lazy:
        """`leaf` itself, or an array as a parameter of one piece."""
        return leaf if isinstance(leaf, cls) else cls(tuple(leaf.shape), np.dtype(leaf.dtype), (((), lambda: np.asarray(leaf)),))

    @classmethod
    def stack(cls, leaves: Sequence[Any]) -> Lazy:
        """Parameters of one shape along a new leading axis; of several dtypes, in the one that holds them all.

        Args:
          leaves: arrays or `Lazy`s, at least one.
        """
        parts = [cls.of(leaf) for leaf in leaves]
        if len({part.shape for part in parts}) != 1:
            raise ValueError(f"parameters of shapes {sorted({part.shape for part in parts})} do not stack")
        pieces = tuple(((i, *at), read) for i, part in enumerate(parts) for at, read in part.pieces)
        return cls((len(parts), *parts[0].shape), common_dtype([part.dtype for part in parts]), pieces)

    def __getitem__(self, index: int) -> Lazy:
        """Entry `index` of the leading axis: a layer of a stack, an expert."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"entry {index} of {self.shape[0]}")
        inside = [(at[1:], read) for at, read in self.pieces if at[:1] == (index,)]
        whole = [((), functools.partial(_entry, read, index)) for at, read in self.pieces if at == ()]
        return Lazy(self.shape[1:], self.dtype, (*inside, *whole))

    def map(self, fn: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], dtype: Any) -> Lazy:
        """A parameter made of this one, piece by piece.

        Args:
          fn: of one piece.
          shape, dtype: of the result, leading axes included.
        """
        return Lazy(shape, np.dtype(dtype), tuple((at, functools.partial(_applied, fn, read)) for at, read in self.pieces))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if len(self.pieces) == 1 and self.pieces[0][0] == ():
            whole = self.pieces[0][1]().astype(self.dtype, copy=False)
        else:
            whole = np.empty(self.shape, self.dtype)
            for at, read in self.pieces:
                whole[at] = read()
        return whole if dtype is None else whole.astype(dtype, copy=False)


def common_dtype(dtypes: Sequence[Any]) -> np.dtype:
    """The narrowest dtype that holds values of all of them, e.g. float32 for bfloat16 and float16; float32 where there are none."""
    return np.dtype(functools.reduce(jnp.promote_types, dtypes)) if len(dtypes) else np.dtype(np.float32)


def _entry(read: Callable[[], np.ndarray], index: int) -> np.ndarray:
    return read()[index].copy()  # the rest is not kept with it


def _applied(fn: Callable[[np.ndarray], np.ndarray], read: Callable[[], np.ndarray]) -> np.ndarray:
    return fn(read())
