"""TPU slices by name, `v5e:4x4`: which exist, and what each tool calls them. Data and arithmetic only.

Sources, read in 2026: [runtimes] docs.cloud.google.com/tpu/docs/runtimes; [v4], [v5e], [v5p], [v6e] the pages of that name beside it; [xpk]
core/system_characteristics.py of xpk 1.16.0; [gcloud] the surface of gcloud 528.0.0, `compute tpus tpu-vm create`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from rlhf_jax.errors import UserError, nearest

CUBE, LONGEST = 4, 256  # chips along an edge of the block that larger 3-D slices are made of, and of the longest slice [xpk]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What all slices of one generation have in common."""

    name: str
    prefix: str  # of Cloud TPU's accelerator type, `v5litepod-16`; the number behind it counts TensorCores
    cores: int  # TensorCores per chip
    runtime: str  # software version of a TPU VM [runtimes]
    flat: tuple[str, ...] = ()  # every shape of a 2-D generation
    small: tuple[str, ...] = ()  # shapes of a 3-D generation below one cube
    cubes: int = 0  # largest number of cubes of a 3-D generation
    one_host: int = 4  # largest number of chips that Cloud TPU puts on one VM; larger slices have 4 to a VM
    gke_least: int = 1  # smallest number of chips that xpk schedules [xpk]
    by_shape: bool = False  # whether gcloud takes a shape, by --type and --topology [gcloud]; else only a size, which stands for its usual shape


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # [v5e], [v6e]
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # [v4], [v5p]
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v4", "v4", 2, "tpu-ubuntu2204-base", small=_SMALL, cubes=64, by_shape=True),  # [v4]: a pod has 4096 chips
        Generation("v5e", "v5litepod", 1, "v2-alpha-tpuv5-lite", flat=_FLAT, one_host=8, gke_least=8),
        Generation("v5p", "v5p", 2, "v2-alpha-tpuv5", small=_SMALL, cubes=96),  # [v5p]: the largest job is 16x16x24, 96 cubes
        Generation("v6e", "v6e", 1, "v2-alpha-tpuv6e", flat=_FLAT, one_host=8),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice."""

    generation: Generation
    shape: tuple[int, ...]  # chips along each axis

    @property
    def text(self) -> str:
        """`4x4`."""
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        """`v5e:4x4`, which is also JAX's name for it."""
        return f"{self.generation.name}:{self.text}"

    @property
    def chips(self) -> int:
        """Chips of the slice, which are JAX's devices on these generations."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Virtual machines of the slice on Cloud TPU, each with a process of its own."""
        return 1 if self.chips <= self.generation.one_host else self.chips // 4

    @property
    def gke_hosts(self) -> int:
        """The same under xpk, which has at most 4 chips on a machine [xpk]."""
        return max(self.chips // 4, 1)

    @property
    def accelerator(self) -> str:
        """Cloud TPU's accelerator type, `v5p-128`: the generation and its TensorCores."""
        return f"{self.generation.prefix}-{self.chips * self.generation.cores}"

    @property
    def usual(self) -> bool:
        """Whether this shape is the one that an accelerator type stands for: of its size, the one nearest to a cube [v5p]."""
        return self.shape == min((one for one in shapes(self.generation.name) if math.prod(one) == self.chips), key=sum)

    @property
    def xpk_type(self) -> str:
        """xpk's --tpu-type: it takes shapes, and what a 3-D size stands for there differs from [v5p] here and there [xpk]."""
        return self.accelerator if self.generation.flat else f"{self.generation.prefix}-{self.text}"


@functools.cache
def shapes(name: str) -> tuple[tuple[int, ...], ...]:
    """Every shape of a generation, the smallest first: those listed, and A ≤ B ≤ C of whole cubes.

    Args:
      name: of the generation.
    """
    generation = GENERATIONS[name]
    listed = [tuple(map(int, text.split("x"))) for text in generation.flat + generation.small]
    edges = range(1, min(generation.cubes, LONGEST // CUBE) + 1)
    blocks = [(a, b, c) for a in edges for b in edges if b >= a for c in edges if c >= b and a * b * c <= generation.cubes]
    return tuple(sorted([*listed, *(tuple(CUBE * edge for edge in block) for block in blocks)], key=lambda shape: (math.prod(shape), sum(shape))))


def parse(text: str) -> Topology:
    """The slice that `v5e:4x4` names.

    Raises:
      UserError: no such generation or shape; it names the nearest.
    """
    name, _, shape_text = text.strip().lower().partition(":")
    if name not in GENERATIONS:
        raise UserError(f"--topology {text!r}: {name!r} is no generation of TPU, as in v5e:4x4{nearest(name, GENERATIONS)}")
    generation = GENERATIONS[name]
    if not re.fullmatch(r"\d+(x\d+)+", shape_text):
        raise UserError(f"--topology {text!r}: write the generation and its shape in chips, like {_example(generation)}")
    shape = tuple(map(int, shape_text.split("x")))
    if shape in shapes(name):
        return Topology(generation, shape)
    raise UserError(f"--topology {text!r}: there is no such slice; the nearest is {_near(generation, shape).name}")


def _near(generation: Generation, shape: tuple[int, ...]) -> Topology:
    """The slice most like a wrong shape: the same edges in order, or else the nearest number of chips."""
    if tuple(sorted(shape)) in shapes(generation.name):
        return Topology(generation, tuple(sorted(shape)))
    chips = max(math.prod(shape), 1)
    return Topology(generation, min(shapes(generation.name), key=lambda one: (abs(math.log(math.prod(one) / chips)), sum(one))))


def _example(generation: Generation) -> str:
    return f"{generation.name}:{'4x4' if generation.flat else '2x2x4'}"
