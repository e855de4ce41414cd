"""All that knows of several hosts or devices: start-up, the mesh, host-local rows ↔ global arrays, what hosts tell each other.

Every host runs the same command with config.mesh.multihost = True and one --workdir that all see. On Cloud TPU, Slurm and other clusters that JAX
knows it finds the others by itself. Elsewhere the environment says who they are; two processes on one machine:

    export JAX_COORDINATOR_ADDRESS=127.0.0.1:9876 JAX_NUM_PROCESSES=2     host 0's address, with any free port; how many there are
    JAX_PROCESS_ID=0 rlhf-jax train --config.mesh.multihost=True … &      and the same with JAX_PROCESS_ID=1

Before anything is compiled the hosts compare config, code, data and starting point (`meeting`): a difference, or what one of them cannot open,
ends them all with one sentence. Later, a host that dies ends the others after config.mesh.heartbeat seconds, from outside Python; for one that lives
and is stuck there is config.run.watchdog (train.watchdog).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding

from rlhf_jax.errors import UserError
from rlhf_jax.ops.partition import SECOND
from rlhf_jax.types import PyTree

AXES = ("data", "fsdp", "expert", "sequence", "tensor")  # what speaks most comes last: its devices are neighbours
RULES = ("tensor", "fsdp2d")  # config.mesh.rules
ADDRESS, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"  # JAX itself reads the first one only
SAID = 3  # differences between hosts that a message names


def initialize(multihost: bool, heartbeat: int = 100) -> None:
    """Joins the other hosts of a pod (`jax.distributed`); nothing to do on one host.

    Args:
      multihost: config.mesh.multihost.
      heartbeat: config.mesh.heartbeat, seconds.

    Raises:
      UserError: JAX cannot tell which hosts there are.
    """
    if not multihost or jax.distributed.is_initialized():
        return
    # A host that fails waits at exit for the others, which wait for it: no longer than they would wait for a dead one.
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": heartbeat}
    # Gloo, which CPUs talk by, matches collectives by their order alone: programs of a process must not overlap. (No matter on TPUs and GPUs.)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(**_by_hand(), **limits)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"config.mesh.multihost = True, but JAX finds no other hosts ({error}): set {ADDRESS}, {PROCESSES} and {PROCESS}, or "
                        "multihost = False on one machine") from error


def _by_hand() -> dict[str, Any]:
    """Who the hosts are, where the environment says so."""
    given = {name: os.environ[name] for name in (PROCESSES, PROCESS) if os.environ.get(name)}
    if not given:
        return {}
    if missing := [name for name in (ADDRESS, PROCESSES, PROCESS) if not os.environ.get(name)]:
        raise UserError(f"config.mesh.multihost = True: {' and '.join(given)} is set, but {' and '.join(missing)} is not: set all three, or none of "
                        "them where the cluster tells")
    wrong = [f"{name} = {value!r}" for name, value in given.items() if not value.isdigit()]
    if wrong or not int(given[PROCESS]) < int(given[PROCESSES]):
        said = ", ".join(wrong) or f"{PROCESS} = {given[PROCESS]} and {PROCESSES} = {given[PROCESSES]}"
        raise UserError(f"config.mesh.multihost = True with {said}: hosts are numbered from 0 to one below their number")
    return {"coordinator_address": os.environ[ADDRESS], "num_processes": int(given[PROCESSES]), "process_id": int(given[PROCESS])}


def is_lead() -> bool:
    """Whether this process writes logs and reports."""
    return jax.process_index() == 0


def hosts() -> int:
    """How many processes there are."""
    return jax.process_count()


# --- what hosts tell each other ---


def exchange(said: Any) -> list[Any]:
    """What every host says, by host. A collective: all hosts call it, between the same programs.

    Args:
      said: JSON-serializable.
    """
    if jax.process_count() == 1:
        return [said]
    content = np.frombuffer(json.dumps(said).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(content)))).reshape(-1)
    width = 1 << int(sizes.max()).bit_length()  # few widths: each is a program of its own
    found = np.asarray(multihost_utils.process_allgather(np.pad(content, (0, width - len(content)))))
    return [json.loads(bytes(row[:size])) for row, size in zip(found, sizes, strict=True)]


def gathered(array: np.ndarray) -> np.ndarray:
    """What every host holds, [hosts, …]. A collective.

    Args:
      array: of the same shape and dtype on all.
    """
    return np.asarray(multihost_utils.process_allgather(array)) if jax.process_count() > 1 else array[None]


def raise_together(error: str | None) -> None:
    """Ends all hosts with the same sentence if one has something to complain about. A collective.

    Args:
      error: this host's, or None.

    Raises:
      UserError: a host had one.
    """
    errors = exchange(error)
    said = {number: text for number, text in enumerate(errors) if text is not None}
    if said:
        number, text = next(iter(said.items()))
        raise UserError(text if len(said) == len(errors) else f"host {number} of {len(errors)}: {text}")


@contextlib.contextmanager
def meeting() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Start-up on all hosts. Yields `agree(facts)`, to be called once, before the first program that needs all hosts: it compares what each host has,
    JSON-serializable facts by name. A UserError before, on any host, is raised on all of them.

    Raises:
      UserError: of another host, or two hosts have different facts.
    """
    met = False

    def agree(facts: Mapping[str, Any]) -> None:
        nonlocal met
        met = True
        raise_together(None)
        compare(exchange(facts))

    try:
        yield agree
    except UserError as error:
        if not met and jax.distributed.is_initialized():
            logging.warning("host %d of %d: %s", jax.process_index(), jax.process_count(), error)  # said, should the others never come
            raise_together(str(error))
        raise


def compare(facts: Sequence[Any]) -> None:
    """Refuses hosts whose facts are not those of host 0.

    Args:
      facts: by host, nested dicts.

    Raises:
      UserError: with the first host that differs, and in what.
    """
    for number, theirs in enumerate(facts):
        found = [f"{key} ({new!r} there, {old!r} on host 0)" for key, old, new in differences(facts[0], theirs)]
        if found:
            more = f" and {len(found) - SAID} more" if len(found) > SAID else ""
            raise UserError(f"host {number} of {len(facts)} differs from host 0 in {', '.join(found[:SAID])}{more}: start every host with the same "
                            "code, command and files")


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, other value) of what differs between nested dicts.

    Args:
      old, new: dicts.
      key: of both, in front of those inside.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def make_mesh(
    sizes: Mapping[str, int], devices: int = 0, available: Sequence[Any] | None = None, *, slices: int = 1, rules: str = "tensor"
) -> Mesh:
    """The mesh of axes `data`, `fsdp`, `expert`, `sequence`, `tensor`; with the rules "fsdp2d" the last one is called `fsdp2`: sharding has a table
    for each.

    Args:
      sizes: devices along each axis, 1 where it is not named; one of them may be -1, which takes what is left.
      devices: use this many devices only; 0 = all.
      available: the devices to choose from, e.g. those of a topology that programs are compiled for; None = this machine's.
      slices: config.mesh.slices, TPU slices joined by a slower network, which `data` alone is laid across.
      rules: config.mesh.rules, one of RULES.

    Raises:
      UserError: the product of the sizes is not the number of devices, or slices that are not there.
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
    names = tuple(SECOND if name == "tensor" and rules == "fsdp2d" else name for name in AXES)
    return Mesh(arranged(chosen, shape, slices, whole=len(chosen) == len(available)), names, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(devices: Sequence[Any], shape: Sequence[int], slices: int, whole: bool = True) -> np.ndarray:
    """The devices in the mesh's shape: on TPUs so that axes lie along the torus, the last ones nearest, and `data` goes across slices first.

    Args:
      devices: as many as the shape holds.
      shape: of the mesh, `data` first.
      slices: see `make_mesh`; without TPUs, equal parts of the devices stand for them.
      whole: the devices are all there are; of a part nobody knows that it is a torus.

    Raises:
      UserError: `data` is no multiple of the slices, or TPUs lie on another number of them.
    """
    if shape[0] % slices:
        raise UserError(f"config.mesh.data = {shape[0]} is no multiple of config.mesh.slices = {slices}: the network between slices carries data "
                        "parallelism only; choose a multiple")
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    found = len({getattr(device, "slice_index", 0) for device in devices})  # a single slice of a topology has none
    if found != slices:
        raise UserError(f"config.mesh.slices = {slices}, but the {len(devices)} chips here lie on {found}: set it to {found}, and config.mesh.data "
                        "to a multiple of it")
    if not whole:
        return np.array(devices).reshape(shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = (slices, *(1,) * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh((shape[0] // slices, *shape[1:]), across, devices, allow_split_physical_axes=True)


def _compile_afresh() -> None:
    """Switches the persistent compilation cache off for the rest of this process. On jax 0.10.2's CPU a program of several devices that is read
    back from it may run its collectives in another order on one device than on the others, and all of them wait for ever."""
    if jax.config.values["jax_enable_compilation_cache"]:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()


def to_global(batch: PyTree, sharding: NamedSharding) -> PyTree:
    """This host's NumPy rows as global arrays; with one process a plain placement.

    Args:
      batch: leaves [B_host, …], those of sharding.host_rows in order.
      sharding: of the leading axis.
    """

    def place(leaf: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    with jax.transfer_guard_host_to_device("allow"):  # asked for, which the guard sees of one process only
        return jax.tree.map(place, batch)


def own_rows(array: jax.Array) -> np.ndarray:
    """This host's rows of a global array, in order: the inverse of `to_global`. Waits for the device; no collective.

    Args:
      array: [B, …], split along its leading axis only.
    """
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([jax.device_get(shards[start]) for start in sorted(shards)])


def all_rows(array: jax.Array) -> np.ndarray:
    """A global array as a whole, on every host. Waits for the device. A collective.

    Args:
      array: [B, …].
    """
    return np.asarray(jax.device_get(array) if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))
