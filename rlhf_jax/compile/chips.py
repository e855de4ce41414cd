"""What a TPU chip of each generation has, and the devices of a slice without one of them being here.

Peaks are Google's published ones (cloud.google.com/tpu/docs: the system architecture page of each version), per chip: bfloat16 FLOP/s, HBM bytes and
bytes/s, and the bandwidth of all its inter-chip links together, given there in Gbit/s and here in bytes/s. Which slices there are, launch.topologies
says.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.launch.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip."""

    hbm: int  # bytes
    flops: float  # bfloat16 multiply-adds × 2, 1/s
    bandwidth: float  # of HBM, bytes/s
    links: float  # of all its inter-chip links, bytes/s


CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 1228e9, 300e9),
    "v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9),
    "v6e": Chip(32 * 2**30, 918e12, 1640e9, 448e9),
}
EXTRA = "pip install 'rlhf-jax[compile]'"


def chip(topology: Topology) -> Chip:
    """Of the slice's generation."""
    return CHIPS[topology.generation.name]


def prepare(topology: Topology) -> None:
    """Sets what the TPU's compiler reads from the environment; before JAX is imported.

    Args:
      topology: what will be compiled for.

    Raises:
      UserError: it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {topology.name}: the TPU's compiler is a package of its own, which runs on any Linux CPU: {EXTRA}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_ACCELERATOR_TYPE"] = topology.accelerator


def devices(topology: Topology) -> list[Any]:
    """The slice's devices, which only compile.

    Args:
      topology: the slice.

    Raises:
      UserError: the compiler knows no such slice.
    """
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except Exception as error:  # whatever the plugin raises
        said = " ".join(str(error).split())
        raise UserError(f"--topology {topology.name}: the TPU's compiler knows no such slice ({said[:200]}): choose another") from error
    return list(found.devices)
