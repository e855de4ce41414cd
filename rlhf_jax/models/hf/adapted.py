"""The modules of theirs that adapters may lie beside, which projections of ours each is, and how PEFT's adapter_config.json speaks of them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.models import families, lora
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf.rows import Row, expand


@dataclasses.dataclass(frozen=True)
class Module:
    """One of their linear modules and the projections of ours that it is."""

    name: str  # "model.layers.0.self_attn.qkv_proj"
    ours: tuple[str, ...]  # ("layers/0/query", "layers/0/key", "layers/0/value")
    shapes: tuple[tuple[int, int], ...]  # (in, out) of each
    row: Row
    config: ModelConfig

    @property
    def into(self) -> int:
        """Its inputs."""
        return self.shapes[0][0]

    @property
    def out(self) -> int:
        """Its outputs, of all projections."""
        return sum(out for _, out in self.shapes)

    @functools.cached_property
    def turned(self) -> bool:
        """Whether the module keeps its kernel as [out, in]; a Conv1D does not."""
        return self.row.join([np.zeros((1, out), np.int8) for _, out in self.shapes], self.config).shape[1] == 1

    def split(self, theirs: np.ndarray) -> list[np.ndarray]:
        """What a row of each output means here.

        Args:
          theirs: [out, n], the module's outputs first: B, or magnitudes with n = 1.

        Returns:
          [n, out] of each projection.
        """
        return list(self.row.split(theirs if self.turned else theirs.T, self.config))

    def join(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `split`.

        Args:
          ours: [n, out] of each projection.
        """
        theirs = self.row.join(ours, self.config)
        return theirs if self.turned else theirs.T


def modules(config: ModelConfig) -> dict[str, Module]:
    """Every module that may have an adapter, by name.

    Args:
      config: the network.
    """
    shapes = lora.kernels(config)
    found = {}
    for placement in expand(families.load(config.family).ROWS, config, {f"{path}/kernel" for path in shapes}):
        ours = tuple(path.removesuffix("/kernel") for path in placement.ours)
        name = placement.theirs[0].removesuffix(".weight")
        found[name] = Module(name, ours, tuple(shapes[path] for path in ours), placement.row, config)
    return found


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT puts an adapter on a module (its `check_target_module_exists`).

    Args:
      config: adapter_config.json.
      module: its name.
    """
    ends = lambda names: any(module == name or module.endswith(f".{name}") for name in names)  # noqa: E731
    excluded, targets = config.get("exclude_modules") or (), config.get("target_modules")
    if re.fullmatch(excluded, module) if isinstance(excluded, str) else ends(excluded):
        return False
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or r"[^.]*"
    if not ends(targets or ()) or layers is None or layers == []:
        return ends(targets or ())
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in ([patterns] if isinstance(patterns, str) else patterns))
    index = next((int(match[1]) for match in found if match), None)
    return index in ([layers] if isinstance(layers, int) else layers)


def by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's choice of a module's rank or alpha: the first pattern that its name ends on.

    Args:
      patterns: rank_pattern or alpha_pattern.
      module: its name.
      default: r or lora_alpha.
    """
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), default)
