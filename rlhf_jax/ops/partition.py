"""Logical sharding constraints: models name the axes of an activation, `sharding.py` says what the names mean.

Outside `axis_rules` every constraint is a no-op, so that a forward or a step is testable bare.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.types import Array

MeshAxes = str | tuple[str, ...] | None
SECOND = "fsdp2"  # what the mesh axis `tensor` is called where it splits parameters and rows, as `fsdp` does
_context: contextvars.ContextVar[tuple[Mesh, Mapping[str, MeshAxes]] | None] = contextvars.ContextVar("axis_rules", default=None)


@contextlib.contextmanager
def axis_rules(mesh: Mesh, rules: Mapping[str, MeshAxes]) -> Iterator[None]:
    """While tracing inside, `constrain` pins logical axes to `rules[name]` of `mesh`."""
    token = _context.set((mesh, rules))
    try:
        yield
    finally:
        _context.reset(token)


def mesh() -> Mesh | None:
    """The mesh of the axis rules around; None outside."""
    context = _context.get()
    return None if context is None else context[0]


def constrain(x: Array, names: tuple[str | None, ...]) -> Array:
    """`x` with its axes pinned: `names[i]` is axis i's logical name, None leaves it whole.

    Args:
      x: any array under trace.
      names: one entry per axis.
    """
    chex.assert_rank(x, len(names))
    context = _context.get()
    if context is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(context[0], spec(names)))


Names = tuple[str | None, ...]


def size(name: str) -> int:
    """Over how many devices a logical axis is spread; 1 outside `axis_rules`."""
    context = _context.get()
    return 1 if context is None else _size(context[0], context[1][name])


def spec(names: Names) -> PartitionSpec:
    """Where the axis rules put an array of these logical axes, None = whole."""
    context = _context.get()
    return PartitionSpec(*(None if name is None or context is None else context[1][name] for name in names))


def even(name: str, length: int) -> str | None:
    """The name of a logical axis whose devices divide this length; None where they do not, and the axis stays whole."""
    return name if length % size(name) == 0 else None


def divides(shape: tuple[int, ...], names: Names) -> bool:
    """Whether the devices divide every axis of an array.

    Args:
      shape: of the array.
      names: the logical name of each axis, None = whole.
    """
    return all(name is None or length % size(name) == 0 for length, name in zip(shape, names, strict=True))


def per_device(fn: Callable[..., Any], args: tuple[Array, ...], names: tuple[Names, ...], out: Names, axes: tuple[str, ...]) -> Any:
    """`fn` on every device for its own share of the arguments; a plain call outside `axis_rules`, or where the mesh does not divide them.

    Args:
      fn: takes the arguments, and `axes` by that name if there are any: the mesh axes over which it speaks to other devices.
      args: arrays.
      names: each argument's logical axes, None = whole.
      out: those of the result.
      axes: logical names of the mesh axes that `fn` is told.
    """
    chex.assert_equal(len(args), len(names))
    context = _context.get()
    if context is None:
        return fn(*args)
    if not all(divides(x.shape, axes) for x, axes in zip(args, names, strict=True)):
        return fn(*args)
    mesh, rules = context
    specs = tuple(map(spec, names))
    local = functools.partial(fn, axes=tuple(rules[name] for name in axes)) if axes else fn
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec(out), check_vma=False)(*args)


def _size(mesh: Mesh, axes: MeshAxes) -> int:
    """Over how many devices an array axis is spread."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
