"""TPU topologies: what a chip of each kind has, which shapes there are, and their devices without one of them being here.

Peaks are Google's published ones (cloud.google.com/tpu/docs: the system architecture page of each version), per chip: bfloat16 FLOP/s, HBM bytes and
bytes/s, and the bandwidth of all its inter-chip links together, given there in Gbit/s and here in bytes/s, both directions counted once.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip."""

    name: str
    hbm: int  # bytes
    flops: float  # bfloat16 multiply-adds × 2, 1/s
    bandwidth: float  # of HBM, bytes/s
    links: float  # of all its inter-chip links, bytes/s out
    dimensions: int  # of the torus
    hosted: int  # chips per host


CHIPS = {
    "v4": Chip("v4", 32 * 2**30, 275e12, 1228e9, 300e9, 3, 4),
    "v5e": Chip("v5e", 16 * 2**30, 197e12, 819e9, 200e9, 2, 4),
    "v5p": Chip("v5p", 95 * 2**30, 459e12, 2765e9, 600e9, 3, 4),
    "v6e": Chip("v6e", 32 * 2**30, 918e12, 1640e9, 448e9, 2, 4),
}
ACCELERATOR = {"v4": "v4-8", "v5e": "v5litepod-16", "v5p": "v5p-8", "v6e": "v6e-16"}  # any of the kind: the compiler asks which chip it serves
EXTRA = "pip install 'rlhf-jax[compile]'"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of the torus

    @classmethod
    def parse(cls, name: str) -> Topology:
        """From a name such as v5p:4x4x4.

        Args:
          name: the chip, a colon, chips along each dimension.

        Raises:
          UserError: no such chip, or another number of dimensions than its torus has.
        """
        match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)+)", name)
        if match is None:
            raise UserError(f"--topology {name!r}: write the chip and its torus, e.g. v5p:4x4x4 or v5e:4x4")
        kind, sizes = match[1], tuple(int(size) for size in match[2].split("x"))
        if kind not in CHIPS:
            near = difflib.get_close_matches(kind, CHIPS, 1)
            raise UserError(f"--topology {name!r}: {kind!r} is none of {', '.join(CHIPS)}{f'; did you mean {near[0]}?' if near else ''}")
        chip = CHIPS[kind]
        if len(sizes) != chip.dimensions or min(sizes) < 1:
            example = "x".join("4" * chip.dimensions)
            raise UserError(f"--topology {name!r}: a {kind} slice has {chip.dimensions} dimensions, e.g. {kind}:{example}")
        return cls(chip, sizes)

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> list[Any]:
        """The slice's devices, which only compile.

        Raises:
          UserError: the compiler is not installed, or knows no such slice.
        """
        from jax.experimental import topologies

        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=str(self))
        except Exception as error:  # whatever the plugin raises
            said = " ".join(str(error).split())
            raise UserError(f"--topology {self}: the TPU compiler knows no such slice ({said[:200]}): choose another") from error
        return list(found.devices)


def prepare(topology: Topology) -> None:
    """What the TPU compiler reads from the environment; before JAX is imported.

    Args:
      topology: what will be compiled for.

    Raises:
      UserError: it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {topology}: the TPU compiler is a package of its own, which runs on any Linux CPU: {EXTRA}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_ACCELERATOR_TYPE"] = ACCELERATOR[topology.chip.name]
