"""A checkpoint's parameters in the tree that a network wants: heads it lacks, adapters, quantised kernels. Nothing is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models import lora, quantise
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lazy import Lazy
from rlhf_jax.types import PyTree

HEADS = ("lm_head", "score_head", "value_head")


class _Drawn:
    """Stands for a leaf that no checkpoint holds."""


DRAWN = _Drawn()


def adopt(fresh: PyTree, loaded: PyTree, config: ModelConfig) -> PyTree:
    """`fresh`'s tree with `loaded`'s leaves in it, canonical: a leaf that only `fresh` has is DRAWN, a critic's value head starts from a reward
    model's score head, a DoRA magnitude from its kernel's norms, and kernels are quantised on the way where `config` says so.

    Args:
      fresh: newly drawn parameters, abstract.
      loaded: a checkpoint's parameters of the same trunk, read or not.
      config: of the network.

    Raises:
      UserError: a leaf has another shape than the network's, or the checkpoint holds leaves of the trunk that the network has not.
    """
    if "value_head" in fresh["ends"] and "value_head" not in loaded["ends"] and "score_head" in loaded["ends"]:
        kernel = {"kernel": loaded["ends"]["score_head"]["kernel"]}
        loaded = {**loaded, "ends": {**loaded["ends"], "value_head": kernel}}
    dropped = {name: leaf for name, leaf in loaded["ends"].items() if name in fresh["ends"] or name not in HEADS}
    return _adopt(fresh, {**loaded, "ends": dropped}, config, "")


def _adopt(fresh: Any, loaded: Any, config: ModelConfig, path: str) -> Any:
    if not isinstance(fresh, dict):
        if loaded is None:
            return DRAWN
        if tuple(loaded.shape) != tuple(fresh.shape):
            raise UserError(f"the checkpoint's {path} has shape {tuple(loaded.shape)}, and the network wants {tuple(fresh.shape)}")
        return loaded
    loaded = dict(loaded or {})
    if quantise.CODES in fresh and "kernel" in loaded:
        loaded |= _quantised(Lazy.of(loaded.pop("kernel")), fresh, config)
    if "magnitude" in fresh and "magnitude" not in loaded and ("kernel" in loaded or quantise.CODES in loaded):
        loaded["magnitude"] = _magnitude(loaded, fresh)
    if extra := sorted(loaded.keys() - fresh.keys()):
        raise UserError(f"the checkpoint holds {', '.join(f'{path}/{name}'.strip('/') for name in extra)}, which the network has not")
    return {name: _adopt(leaf, loaded.get(name), config, f"{path}/{name}".strip("/")) for name, leaf in fresh.items()}


def _quantised(kernel: Lazy, fresh: Mapping[str, Any], config: ModelConfig) -> dict[str, Lazy]:
    made = {quantise.CODES: lambda whole: quantise.write(whole, config.quantise)[quantise.CODES],
            quantise.SCALES: lambda whole: quantise.scales(whole, config.quantise)}
    return {name: kernel.map(make, fresh[name].shape, fresh[name].dtype) for name, make in made.items()}


def _magnitude(loaded: Mapping[str, Any], fresh: Mapping[str, Any]) -> Lazy:
    """‖W‖ of the columns, of the kernel as the network reads it."""

    def norms() -> np.ndarray:
        if quantise.CODES in loaded:
            kernel = quantise.read({name: np.asarray(loaded[name]) for name in (quantise.CODES, quantise.SCALES)}, np.float32)
        else:
            kernel = np.asarray(loaded["kernel"])
        return lora.column_norms(kernel)

    return Lazy(tuple(fresh["magnitude"].shape), np.dtype(np.float32), (((), norms),))


def missing(tree: PyTree) -> list[str]:
    """Paths of an adopted tree's DRAWN leaves."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if leaf is DRAWN]
