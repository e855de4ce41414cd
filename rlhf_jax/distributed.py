"""All that knows of several hosts or devices: start-up, the mesh, host-local rows → global arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding

from rlhf_jax.errors import UserError
from rlhf_jax.types import PyTree

AXES = ("data", "fsdp", "expert", "sequence", "tensor")  # what speaks most comes last: its devices are neighbours


def initialize(multihost: bool) -> None:
    """Joins the other hosts of a pod (`jax.distributed`); nothing to do on one host.

    Args:
      multihost: config.mesh.multihost.

    Raises:
      UserError: JAX cannot tell which hosts there are.
    """
    if multihost and not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise UserError(f"config.mesh.multihost = True, but JAX finds no other hosts ({error}): set it to False on one machine") from error


def is_lead() -> bool:
    """Whether this process writes logs and reports."""
    return jax.process_index() == 0


def host() -> tuple[int, int]:
    """(index, count) of this process, for slicing the global batch."""
    return jax.process_index(), jax.process_count()


def make_mesh(sizes: Mapping[str, int], devices: int = 0, available: Sequence[Any] | None = None) -> Mesh:
    """The mesh of axes `data`, `fsdp`, `expert`, `sequence`, `tensor`.

    Args:
      sizes: devices along each axis, 1 where it is not named; one of them may be -1, which takes what is left.
      devices: use this many devices only; 0 = all.
      available: the devices to choose from, e.g. those of a topology that programs are compiled for; None = this machine's.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    available = jax.devices() if available is None else list(available)
    if devices > len(available):
        raise UserError(f"config.mesh.devices = {devices}, but {len(available)} are here: choose at most that, or 0 for all")
    chosen = available[:devices] if devices else available
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    said = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if any(size == 0 or size < -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"config.mesh has {said}: sizes are positive, and at most one is -1 (what is left)")
    known = int(np.prod([size for size in shape if size != -1]))
    if -1 in shape and len(chosen) % known == 0:
        shape[shape.index(-1)] = len(chosen) // known
    if int(np.prod(shape)) != len(chosen):
        raise UserError(
            f"config.mesh has {said}, which does not match the {len(chosen)} devices here: the product must equal it "
            f"(one axis may be -1, and config.mesh.devices limits how many are used)"
        )
    if len(chosen) > 1 and chosen[0].platform == "cpu":
        _compile_afresh()
    return Mesh(np.array(chosen).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _compile_afresh() -> None:
    """Switches the persistent compilation cache off for the rest of this process. On jax 0.10.2's CPU a program of several devices that is read
    back from it may run its collectives in another order on one device than on the others, and all of them wait for ever."""
    if jax.config.values["jax_enable_compilation_cache"]:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()


def to_global(batch: PyTree, sharding: NamedSharding) -> PyTree:
    """This host's NumPy rows as global arrays; with one process a plain placement.

    Args:
      batch: leaves [B_host, …].
      sharding: of the leading axis.
    """

    def place(leaf: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, batch)
