"""Which mesh, and which microbatches and remat: all that divide, ranked by a lower bound, the best few compiled, what is compiled remembered.

The bound of a candidate needs no compiler: products at the chip's peak, weights gathered for every pass and gradients scattered once per microbatch
over the axes that hold them, activations reduced over `tensor` twice a layer and pass, optimizer state once through the memory. What a candidate
needs of HBM is guessed too, and one that is far over is not compiled. On v4 and v5p a long one-dimensional `fsdp` axis makes the compiler reduce
weights in the place of gathering them (it writes an all-gather over more chips than one torus dimension holds as an all-reduce of zero-padded
shards): candidates are charged for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax.compile.chips import chip as of
from rlhf_jax.compile.measure import Measured, total
from rlhf_jax.launch.topologies import Topology
from rlhf_jax.models import ModelConfig

BEST = 3  # candidates that are compiled
REMATS = ("none", "dots", "full")
EFFICIENCY = 0.5  # of the products' peak: what divides candidates that differ in recomputation only
_LONGEST_RING = 16  # chips over which an all-gather stays one on a three-dimensional torus


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way of laying the run out."""

    mesh: Mapping[str, Any]  # config.mesh's axes and rules
    microbatches: int
    remat: str
    bound: float  # seconds of one batch, at least, by our own count
    bytes: float  # of a chip's HBM, by our own guess

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}={size}" for axis, size in self.mesh.items() if axis != "rules" and size > 1) or "one chip"
        rules = " rules=fsdp2d" if self.mesh["rules"] == "fsdp2d" else ""
        return f"{sizes}{rules} microbatches={self.microbatches} remat={self.remat}"

    def apply(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with this layout.

        Args:
          config: checked.
        """
        return {**config, "mesh": {**config["mesh"], **self.mesh, "devices": 0}, "model": {**config["model"], "remat": self.remat},
                "run": {**config["run"], "microbatches": self.microbatches}}


def candidates(config: Mapping[str, Any], models: Mapping[str, ModelConfig], trained: Sequence[str], topology: Topology, rows: int, length: int
               ) -> list[Candidate]:
    """All that divide, best bound first; those that by our guess fit before those that do not.

    Args:
      config: checked.
      models: the networks by name, the policy or reward model first.
      trained: which of them train.
      topology: what it is for.
      rows: of an update.
      length: tokens of a row.
    """
    first = next(iter(models.values()))
    found = []
    for mesh in _meshes(topology.chips, first):
        across = topology.chips // (1 if mesh["rules"] == "fsdp2d" else mesh["tensor"])
        for microbatches, remat in itertools.product(_powers(rows), REMATS):
            if rows % microbatches or (rows // microbatches) % across:
                continue
            bound = _bound(models, trained, mesh, topology, rows * length, microbatches, remat)
            size = _bytes(models, trained, mesh, config["optimizer"]["moment_dtype"], rows * length // across // microbatches, remat)
            found.append(Candidate(mesh, microbatches, remat, bound, size))
    return sorted(found, key=lambda one: (one.bytes > of(topology).hbm, one.bound))


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def _meshes(chips: int, model: ModelConfig) -> Iterator[dict[str, Any]]:
    """Meshes over all chips whose axes divide the network."""
    for tensor in _powers(min(model.kv_heads, 16)):
        for expert in _powers(model.experts) if model.experts else [1]:
            if chips % (tensor * expert) or any(size % tensor for size in (model.heads, model.kv_heads, model.mlp)) or (
                    model.experts and model.experts % expert):
                continue
            left = chips // (tensor * expert)
            for fsdp in _powers(left):
                if left % fsdp == 0 and model.hidden % fsdp == 0:
                    mesh = {"data": left // fsdp, "fsdp": fsdp, "expert": expert, "sequence": 1, "tensor": tensor}
                    yield {**mesh, "rules": "tensor"}
                    if tensor > 1 and fsdp > 1:
                        yield {**mesh, "rules": "fsdp2d"}


def _parameters(model: ModelConfig) -> tuple[float, float]:
    """(of all layers' kernels, of the tables)."""
    attention = model.hidden * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    kernels = (3 if model.gated else 2) * model.hidden
    mlp = kernels * (model.expert_mlp * model.experts if model.experts else model.mlp)
    tables = model.vocab_size * model.hidden * (1 if model.tied or "lm" not in model.outputs else 2)
    return float(model.layers * (attention + mlp)), float(tables)


def _bound(models: Mapping[str, ModelConfig], trained: Sequence[str], mesh: Mapping[str, Any], topology: Topology, tokens: int, microbatches: int,
           remat: str) -> float:
    chip, chips, seconds, width = of(topology), topology.chips, 0.0, 2.0  # bytes of what is gathered
    both = mesh["rules"] == "fsdp2d"
    held, tensor = mesh["fsdp"] * (mesh["tensor"] if both else 1), 1 if both else mesh["tensor"]
    for name, model in models.items():
        kernels, tables = _parameters(model)
        active = kernels * (model.experts_per_token / model.experts if model.experts else 1.0)
        passes = 1.0 if name not in trained else 3.0 + {"none": 0.0, "dots": 0.15, "full": 1.0}[remat]
        compute = 2.0 * (active + tables / 2) * tokens * passes / chips / chip.flops / EFFICIENCY
        own = width * kernels / tensor / mesh["expert"]  # of a chip's kernels, gathered
        gathered = own * (held - 1) / held * microbatches * min(passes, 3.0)
        if len(topology.shape) == 3 and mesh["fsdp"] > _LONGEST_RING:
            gathered *= 2.0
        reduced = 2.0 * own / held * (mesh["data"] - 1) / mesh["data"] if name in trained else 0.0
        activations = 4.0 * width * model.layers * tokens / chips * tensor * model.hidden * (tensor - 1) / tensor * min(passes, 3.0)
        state = (kernels + tables) / (held * tensor) * (28.0 if name in trained else 0.0)
        read = own * microbatches * passes
        seconds += max(compute, (gathered + reduced + activations) / chip.links, (state + read) / chip.bandwidth)
    return seconds


def _bytes(models: Mapping[str, ModelConfig], trained: Sequence[str], mesh: Mapping[str, Any], moments: str, tokens: int, remat: str) -> float:
    """Of a chip, for parameters, optimizer and the activations that the backward pass of one microbatch keeps."""
    found = 0.0
    for name, model in models.items():
        kernels, tables = _parameters(model)
        held = (kernels + tables) / (mesh["fsdp"] * mesh["tensor"])
        width = 4 if model.param_dtype == "float32" else 2
        found += held * (width + (4 + 2 * (4 if moments == "float32" else 2) if name in trained else 0))
        whole = 1 if mesh["rules"] == "fsdp2d" else mesh["tensor"]
        found += 2.0 * kernels / whole / max(model.layers, 1) * 2  # a layer gathered, and the next
        if name in trained:
            kept = {"none": 34.0, "dots": 18.0, "full": 2.0}[remat]
            found += kept * tokens * model.hidden * model.layers + 40.0 * tokens * model.hidden
    return found


def search(ranked: Sequence[Candidate], compiled: Callable[[Candidate], list[Measured]], say: Callable[[str], None], best: int = BEST
           ) -> list[tuple[Candidate, list[Measured]]]:
    """Compiles the first few; those that fit come first, by the bound of their compiled programs.

    Args:
      ranked: from `candidates`.
      compiled: measures one.
      say: told what is being done.
      best: how many.
    """
    found = []
    for number, one in enumerate(ranked[:best], 1):
        say(f"{number} of {min(best, len(ranked))}: {one}")
        found.append((one, compiled(one)))

    def key(item: tuple[Candidate, list[Measured]]) -> tuple[bool, float]:
        whole = total(item[1])
        return not whole["fits"], whole["lower_bound_seconds"] or math.inf

    return sorted(found, key=key)
