"""A network's adapters as PEFT writes them; `hf/peft.py` says how the two forms correspond."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from rlhf_jax.errors import UserError
from rlhf_jax.models import lora, quantise
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf import adapted, export, safetensors
from rlhf_jax.models.hf import directory as hf
from rlhf_jax.models.hf.adapted import Module
from rlhf_jax.models.hf.peft import CONFIG, NETWORKS, PREFIX, WEIGHTS
from rlhf_jax.models.hf.rows import SCORE, SCORE_HEAD, VALUE_HEAD
from rlhf_jax.types import PyTree


def write_adapter(
    folder: str | os.PathLike[str], config: ModelConfig, params: PyTree, base: str, network: str, *, extra_files: Mapping[str, bytes] | None = None,
    key: str = "--to-peft",
) -> None:
    """Writes the adapters of a network, and a reward model's head, as PEFT would, and a value head in a file of its own; whole or not at all.

    Args:
      folder: the target: absent, empty, or an earlier export, which is replaced.
      config: the network, with `lora`.
      params: its canonical tree, or that part of it that trains; NumPy arrays, `Lazy`s or jax arrays of this process.
      base: the model that they lie on, a folder or a name of the hub.
      network: "policy" or "reward".
      extra_files: further files by plain name: tokenizer, chat template.
      key: the flag that named the folder, for messages.

    Raises:
      UserError: the network has no adapters, the folder holds something else, or a magnitude is missing.
    """
    if config.lora is None:
        raise UserError(f"{key}: the network has no adapters (config.lora.rank = 0): export it whole with --to-hf")
    leaves = traverse_util.flatten_dict(params, sep="/")
    outputs, described = _plan(config, leaves)
    head = [SCORE.theirs.removesuffix(".weight")] if network == "reward" else None
    if head:
        score = leaves[SCORE_HEAD]
        outputs.append(safetensors.Output(PREFIX + SCORE.theirs, _dtype(score), (1, config.hidden), lambda: export.on_host(score).T))
    value_head = [safetensors.Output(path.rpartition("/")[2], np.dtype(np.float32), tuple(leaf.shape), functools.partial(export.on_host, leaf))
                  for path, leaf in leaves.items() if path.startswith(f"{VALUE_HEAD}/")]
    settings = config.lora
    files = {CONFIG: export._json({
        "peft_type": "LORA", "task_type": {name: task for task, name in NETWORKS.items()}[network], "base_model_name_or_path": base,
        "r": settings.rank, "lora_alpha": _whole(settings.alpha), "lora_dropout": settings.dropout, "use_rslora": settings.rslora,
        "use_dora": settings.dora, "bias": "none", "modules_to_save": head, "inference_mode": True, "init_lora_weights": True, **described,
    }), **(extra_files or {})}
    target = Path(folder).resolve()
    export._check_target(target, key)
    export._check_space(target, sum(output.size for output in outputs) + sum(map(len, files.values())), key)
    with export._replacing(target, key) as partial:
        sums = {WEIGHTS: safetensors.write(partial / WEIGHTS, outputs, export.METADATA)}
        if value_head:
            sums[hf.VALUE_HEAD] = safetensors.write(partial / hf.VALUE_HEAD, value_head, export.METADATA)
        sums |= {name: export._write_bytes(partial / name, content) for name, content in files.items()}
        export._write_bytes(partial / hf.SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode())


def _plan(config: ModelConfig, leaves: Mapping[str, Any]) -> tuple[list[safetensors.Output], dict[str, Any]]:
    """The adapters' tensors, and the keys of adapter_config.json that depend on which there are."""
    settings = config.lora
    assert settings is not None
    everything = adapted.modules(config)
    modules = {name: module for name, module in everything.items() if any(f"{path}/{lora.A}" in leaves for path in module.ours)}
    names = _names(config, everything, modules)
    stacked = {row: _stacked([module for module in modules.values() if module.row is row], leaves) for row in {m.row for m in modules.values()}}
    outputs, ranks, alphas = [], {}, {}
    for name, module in modules.items():
        times = stacked[module.row]
        if times > 1:
            ranks[names[name]] = times * settings.rank
            alphas[names[name]] = _whole(settings.alpha * (math.sqrt(times) if settings.rslora else times))
        dtype = _dtype(leaves[next(f"{path}/{lora.A}" for path in module.ours if f"{path}/{lora.A}" in leaves)])
        shapes: dict[str, tuple[tuple[int, ...], Callable[..., np.ndarray]]] = {
            "lora_A.weight": ((times * settings.rank, module.into), _a), "lora_B.weight": ((module.out, times * settings.rank), _b)}
        if settings.dora:
            shapes["lora_magnitude_vector"] = ((module.out,), _magnitude)
        outputs += [safetensors.Output(f"{PREFIX}{name}.{part}", dtype if part != "lora_magnitude_vector" else np.dtype(np.float32), shape,
                                       functools.partial(read, module, leaves, times)) for part, (shape, read) in shapes.items()]
    return outputs, {"target_modules": sorted(set(names.values())), "rank_pattern": ranks, "alpha_pattern": alphas,
                     "fan_in_fan_out": not any(module.turned for module in modules.values())}


def _names(config: ModelConfig, everything: Mapping[str, Module], modules: Mapping[str, Module]) -> dict[str, str]:
    """What target_modules calls each module: its last word, as serving engines expect, where no other module has it and no adapter."""
    last = lambda name: name.rpartition(".")[2]  # noqa: E731
    others = {last(name) for name in everything.keys() - modules.keys()}
    plain = not config.experts  # experts' projections have the same last words
    return {name: last(name) if plain and last(name) not in others else re.sub(r"^.*?\.\d+\.", "", name) for name in modules}


def _stacked(modules: Sequence[Module], leaves: Mapping[str, Any]) -> int:
    """How many A's are stacked in the modules of one row: one where each module's projections share theirs, as those just read do."""
    for module in modules:
        first, *others = [f"{path}/{lora.A}" for path in module.ours if f"{path}/{lora.A}" in leaves]
        if others and not all(np.array_equal(export.on_host(leaves[first]), export.on_host(leaves[other])) for other in others):
            return 1 + len(others)
    return 1


def _a(module: Module, leaves: Mapping[str, Any], times: int) -> np.ndarray:
    paths = [f"{path}/{lora.A}" for path in module.ours if f"{path}/{lora.A}" in leaves][:times]
    return np.concatenate([export.on_host(leaves[path]).T for path in paths])


def _b(module: Module, leaves: Mapping[str, Any], times: int) -> np.ndarray:
    """B's along a diagonal, one column of blocks where A is shared; zeros for projections without an adapter."""
    found = {path: export.on_host(leaves[f"{path}/{lora.B}"]) for path in module.ours if f"{path}/{lora.B}" in leaves}
    sample = next(iter(found.values()))
    blocks = []
    for path, (_, out) in zip(module.ours, module.shapes):
        block = np.zeros((times, len(sample), out), sample.dtype)
        if path in found:
            block[list(found).index(path) if times > 1 else 0] = found[path]
        blocks.append(block.reshape(-1, out))
    return module.join(blocks)


def _magnitude(module: Module, leaves: Mapping[str, Any], times: int) -> np.ndarray:
    """m of each projection; of one without an adapter, its kernel's norms."""
    found = []
    for path in module.ours:
        if f"{path}/{lora.MAGNITUDE}" in leaves:
            found.append(export.on_host(leaves[f"{path}/{lora.MAGNITUDE}"]))
        elif f"{path}/{quantise.CODES}" in leaves:
            kernel = quantise.read({name: export.on_host(leaves[f"{path}/{name}"]) for name in (quantise.CODES, quantise.SCALES)}, np.float32)
            found.append(lora.column_norms(kernel))
        elif f"{path}/kernel" in leaves:
            found.append(lora.column_norms(export.on_host(leaves[f"{path}/kernel"])))
        else:
            raise UserError(f"{module.name} takes magnitudes for all of {', '.join(module.ours)}, and {path} has neither adapter nor kernel here: "
                            "export from the whole network")
    return module.join([m[None, :].astype(np.float32) for m in found]).reshape(-1)


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype) if np.dtype(leaf.dtype) in safetensors.FLOATS.values() else np.dtype(np.float32)


def _whole(value: float) -> int | float:
    """PEFT's own alphas are integers."""
    return int(value) if float(value).is_integer() else float(value)
