"""Logical sharding constraints: models name the axes of an activation, `sharding.py` says what the names mean.

Outside `axis_rules` every constraint is a no-op, so that a forward or a step is testable bare.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

import chex
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.types import Array

MeshAxes = str | tuple[str, ...] | None
_context: contextvars.ContextVar[tuple[Mesh, Mapping[str, MeshAxes]] | None] = contextvars.ContextVar("axis_rules", default=None)


@contextlib.contextmanager
def axis_rules(mesh: Mesh, rules: Mapping[str, MeshAxes]) -> Iterator[None]:
    """While tracing inside, `constrain` pins logical axes to `rules[name]` of `mesh`."""
    token = _context.set((mesh, rules))
    try:
        yield
    finally:
        _context.reset(token)


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
    mesh, rules = context
    spec = PartitionSpec(*(None if name is None else rules[name] for name in names))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
