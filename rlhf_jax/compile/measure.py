"""Compiles a run's programs for a topology and reads off what each of them costs a chip.

From the compiler: bytes of arguments, results and temporaries, the scheduled program, seconds. From us: operations (costs), collectives and traffic
(hlo) and, from these and the chip's published peaks, a lower bound of the time: the longest of what the products, the memory and the links take
alone.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax

from rlhf_jax.compile import costs, hlo
from rlhf_jax.compile.cache import Cache
from rlhf_jax.compile.chips import chip as of
from rlhf_jax.compile.programs import Program
from rlhf_jax.launch.topologies import Topology
from rlhf_jax.types import PyTree

BOUNDS = ("compute", "memory", "links")
VERSION = "2"  # of what is read off a program


@dataclasses.dataclass(frozen=True)
class Measured:
    """One program on one chip."""

    name: str
    runs: bool
    times: int
    args_bytes: int
    temp_bytes: int
    output_bytes: int  # without what takes over an argument's place
    beside_bytes: int  # what lies there meanwhile
    peak_bytes: int  # of all of it
    hbm_bytes: int  # the chip's
    flops: float  # executed, a chip's share
    model_flops: float  # without what remat does again
    traffic_bytes: float
    collectives: Mapping[tuple[str, tuple[str, ...]], tuple[int, int, float]]
    seconds: Mapping[str, float]  # of BOUNDS
    compile_seconds: float
    refused: str = ""  # the compiler's own words where it does not fit

    @property
    def fits(self) -> bool:
        return not self.refused and self.peak_bytes <= self.hbm_bytes

    @property
    def bound(self) -> tuple[str, float]:
        """What holds it up, and its lower bound in seconds."""
        return max(self.seconds.items(), key=lambda item: item[1])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = dataclasses.asdict(self) | {"fits": self.fits}
        found["collectives"] = [
            {"kind": kind, "axes": list(axes), "runs": runs, "bytes": size, "sent_bytes": sent}
            for (kind, axes), (runs, size, sent) in self.collectives.items()
        ]
        if not self.refused:
            found["bound"], found["lower_bound_seconds"] = self.bound
        return found

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measured:
        """The inverse of `to_json`.

        Args:
          values: plain.
        """
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        rows = values["collectives"]
        return cls(**fields | {"collectives": {(row["kind"], tuple(row["axes"])): (row["runs"], row["bytes"], row["sent_bytes"]) for row in rows}})


def shard_bytes(tree: PyTree) -> int:
    """Bytes of a tree's leaves on one device.

    Args:
      tree: shapes on their shardings.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        part = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += math.prod(part) * size
    return total


def measure(program: Program, model: Program, topology: Topology, mesh: Mapping[str, int], loops: int, cache: Cache) -> Measured:
    """Compiles one program, or remembers what came of it.

    Args:
      program: from compile.programs.
      model: the same without remat.
      topology: what it is compiled for.
      mesh: devices along each axis.
      loops: how often the body of a while_loop runs, at most.
      cache: where measurements are kept, by the lowered program.
    """
    traced = program.fn.trace(*program.args)
    lowered = traced.lower()
    executed = costs.flops(traced.jaxpr, loops) / topology.chips
    needed = costs.flops(model.fn.trace(*model.args).jaxpr, loops) / topology.chips
    key = "\n".join((VERSION, version("jax"), version("libtpu"), topology.name, repr(program.beside), lowered.as_text()))
    found = cache.get(key, lambda: _compiled(program, lowered, topology, mesh, executed, needed).to_json())
    return dataclasses.replace(Measured.from_json(found), name=program.name, runs=program.runs, times=program.times)


def _compiled(program: Program, lowered: Any, topology: Topology, mesh: Mapping[str, int], executed: float, needed: float) -> Measured:
    chip, beside, start = of(topology), shard_bytes(program.beside), time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        args = shard_bytes(program.args)
        return Measured(program.name, program.runs, program.times, args, 0, 0, beside, _wanted(str(error), args + beside), chip.hbm, executed, needed,
                        0.0, {}, {}, time.monotonic() - start, str(error))
    took, text, memory = time.monotonic() - start, compiled.as_text(), compiled.memory_analysis()
    found = hlo.summed(hlo.collectives(text, mesh))
    traffic = hlo.traffic(text)
    sent = sum(size for _, _, size in found.values())
    seconds = {"compute": executed / chip.flops, "memory": traffic / chip.bandwidth, "links": sent / chip.links}
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output + memory.generated_code_size_in_bytes + beside
    return Measured(
        program.name, program.runs, program.times, memory.argument_size_in_bytes, memory.temp_size_in_bytes, output, beside, peak, chip.hbm, executed,
        needed, traffic, found, seconds, took,
    )


def _wanted(said: str, least: int) -> int:
    """The bytes that a program wanted, as the compiler says it when it gives up: all of them, or its temporaries alone."""
    whole = re.search(r"Used ([\d.]+)([KMG]) of", said)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMG])\)", said)
    size = lambda match: int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[match[2]])  # noqa: E731
    return max(least, size(whole)) if whole else least + size(temporaries) if temporaries else least


def breakdown(refused: str) -> list[tuple[int, str, str]]:
    """The compiler's largest allocations of a program that does not fit: bytes, shape, where from.

    Args:
      refused: what it said.
    """
    found = []
    for size, unit, rest in re.findall(r"Size: ([\d.]+)([KMG])\n(.*?)(?=\n\s*\n|\n\s*=====|\Z)", refused, re.S):
        operator, shape = re.search(r'op_name="([^"]*)"', rest), re.search(r"Shape: (\S+)", rest)
        found.append((int(float(size) * 2 ** {"K": 10, "M": 20, "G": 30}[unit]), shape[1] if shape else "", operator[1] if operator else ""))
    return sorted(found, reverse=True)


def total(found: Sequence[Measured]) -> dict[str, Any]:
    """Of the whole run: the most that any program that runs needs, and the bound of one batch or iteration, phase by phase.

    Args:
      found: of all programs.
    """
    whole = [one for one in found if one.runs] or list(found)
    worst = max(whole, key=lambda one: one.peak_bytes - one.hbm_bytes)
    fits = all(one.fits for one in whole)
    seconds = None if any(one.refused for one in whole) else sum(one.bound[1] for one in whole)
    return {"fits": fits, "peak_bytes": worst.peak_bytes, "worst": worst.name, "margin_bytes": worst.hbm_bytes - worst.peak_bytes,
            "lower_bound_seconds": seconds}
