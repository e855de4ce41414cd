"""Adapters in PEFT's format, read: `adapter_config.json` and `adapter_model.safetensors`. (Written: `hf/peft_export.py`.)

The family's weight table says which of their modules is which of our projections. A is [r, in] and B [out, r] there, however the module keeps its
kernel. Where one module is several projections (a fused query, key and value), each gets the module's A and its own rows of B when read; written,
the A's are stacked and the B's set along a diagonal, at k times the rank and the same scale, unless all A's are equal. Both are exact, and so is
splitting DoRA's magnitudes, one per output. A network here has one rank and one scale: smaller ranks (`rank_pattern`) are filled up with zeros,
other scales (`alpha_pattern`) go into B, and layers without an adapter (`layers_to_transform`) get one of zeros. Such zeros stay zeros in training,
because A and B each have a gradient only where the other is not zero.
Deviation from PEFT: what it would load with a warning, or not at all, is an error that lists every misfit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from rlhf_jax.errors import UserError
from rlhf_jax.models import families, lora
from rlhf_jax.models.config import PROJECTIONS, Lora, ModelConfig
from rlhf_jax.models.hf import adapted, safetensors
from rlhf_jax.models.hf import directory as hf
from rlhf_jax.models.hf.adapted import Module
from rlhf_jax.models.hf.rows import EMBEDDING, LM_HEAD, SCORE, SCORE_HEAD, VALUE_HEAD
from rlhf_jax.models.hf.safetensors import Tensor
from rlhf_jax.models.lazy import Lazy
from rlhf_jax.types import PyTree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name
PARTS = {"lora_A.weight": lora.A, "lora_B.weight": lora.B, "lora_magnitude_vector": lora.MAGNITUDE, "lora_magnitude_vector.weight": lora.MAGNITUDE}
_NAME = re.compile(r"(?P<module>.+?)\.(?P<part>lora_[AB]\.weight|lora_magnitude_vector(\.weight)?)")
NETWORKS = {"CAUSAL_LM": "policy", "SEQ_CLS": "reward"}  # by task_type

# Keys of adapter_config.json: those that are used here, and those that say nothing about what the adapter computes. Any other must be unset.
USED = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "init_lora_weights",
}
SILENT = {"auto_mapping", "revision", "inference_mode", "peft_version", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config",
          "eva_config", "ensure_weight_tying"}
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the other init_lora_weights change the base model's own weights


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened folder; no tensor has been read."""

    path: Path
    key: str  # the config key or flag that named it, for messages
    config: Mapping[str, Any]  # adapter_config.json
    tensors: Mapping[str, Tensor]
    value_head: Mapping[str, Tensor] | None  # of ours: `kernel` [D, 1] and `bias` [1], in a file that PEFT does not look at

    def __str__(self) -> str:
        return f"{self.key} = {str(self.path)!r}"

    @property
    def base(self) -> str:
        """The model that it lies on, as its maker called it: a folder or a name of the hub; "" = not said."""
        return self.config.get("base_model_name_or_path") or ""

    @property
    def network(self) -> str:
        """ "policy" or "reward"."""
        return NETWORKS[self.config.get("task_type") or ("SEQ_CLS" if PREFIX + SCORE.theirs in self.tensors else "CAUSAL_LM")]


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder that holds an adapter of PEFT's."""
    return (Path(path) / CONFIG).is_file()


def open_adapter(path: str | os.PathLike[str], key: str) -> Adapter:
    """Opens an adapter's folder.

    Args:
      path: a local folder.
      key: the config key or flag that named it.

    Raises:
      UserError: a file is missing, damaged, pickled or outside the folder, or the adapter does more than LoRA, rsLoRA and DoRA do.
    """
    folder, subject = Path(path), f"{key} = {str(path)!r}"
    if not is_adapter(folder):
        raise UserError(f"{subject} holds no {CONFIG}: name a folder that PEFT's `save_pretrained` wrote")
    hf._verify(folder, hf.read_sums(folder / hf.SUMS), subject)
    config = hf.read_json(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
        raise UserError(f"{subject} holds {f'only pickled weights ({pickled[0]}), which can run any code' if pickled else f'no {WEIGHTS}'}: "
                        "save it again with PEFT's `save_pretrained`")
    value_head = safetensors.read_header(hf._inside(folder, hf.VALUE_HEAD, subject)) if (folder / hf.VALUE_HEAD).is_file() else None
    adapter = Adapter(folder, key, config, safetensors.read_header(hf._inside(folder, WEIGHTS, subject)), value_head)
    _refuse(adapter)
    return adapter


def _refuse(adapter: Adapter) -> None:
    """Raises for what an adapter asks for and is not built here."""
    config = adapter.config

    def fail(key: str, problem: str) -> None:
        raise UserError(f"{adapter}: {CONFIG} has {key} = {config.get(key)!r}: {problem}")

    _refuse_types(config, fail)
    if config.get("peft_type") != "LORA":
        fail("peft_type", "only LORA (with rsLoRA and DoRA) is read")
    if config.get("task_type") not in (None, *NETWORKS):
        fail("task_type", f"only {' and '.join(NETWORKS)} are read")
    if config.get("bias", "none") != "none":
        fail("bias", "trained biases are not read; merge the adapter with PEFT's `merge_and_unload` and name the merged model")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        fail("init_lora_weights", "this start moves weights of the base model into the adapter; save it as a plain one with PEFT's "
                                  "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`")
    for key in sorted(config.keys() - USED - SILENT):
        if config[key] not in (None, False, "", [], {}):
            fail(key, "is not built here; merge the adapter with PEFT's `merge_and_unload` and name the merged model")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or isinstance(config.get(key), bool) or not 0 < config[key] < 2**31:
            fail(key, "must be a number above 0")
    if not isinstance(config.get("lora_dropout", 0.0), int | float) or not 0 <= config.get("lora_dropout", 0.0) < 1:
        fail("lora_dropout", "must lie in [0, 1)")


def _refuse_types(config: Mapping[str, Any], fail: Callable[[str, str], None]) -> None:
    """Of the keys that are read as names and patterns."""
    names = lambda x: x is None or isinstance(x, str) or (isinstance(x, list) and all(isinstance(y, str) for y in x))  # noqa: E731
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        fail("base_model_name_or_path", "must name a model")
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        if not names(config.get(key)):
            fail(key, "must be a text or a list of texts")
    layers = config.get("layers_to_transform")
    if not all(isinstance(index, int) for index in (layers if isinstance(layers, list) else [] if layers is None else [layers])):
        fail("layers_to_transform", "must be a number or a list of numbers")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(found := config.get(key) or {}, Mapping) or not all(isinstance(x, int | float) and 0 < x < 2**31 for x in found.values()):
            fail(key, "must map names of modules to numbers above 0")
    for key in ("use_dora", "use_rslora"):
        if not isinstance(config.get(key), bool | None):
            fail(key, "must be true or false")
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = config.get(key) or ()
        try:  # names in a list of modules are none
            for pattern in (value,) if isinstance(value, str) else () if key.endswith("_modules") else value:
                re.compile(pattern)
        except re.error as error:
            fail(key, f"is not a regular expression ({error})")


def read_adapter(adapter: Adapter, config: ModelConfig) -> tuple[Lora, PyTree]:
    """An adapter on a network; headers are read, no tensor.

    Args:
      adapter: the opened folder.
      config: the network that it lies on, with the outputs that `adapter.network` needs.

    Returns:
      The settings of `ModelConfig.lora`, and the canonical leaves to be merged over the network's own, a `Lazy` each: adapters, what
      `modules_to_save` put in the place of the embedding table or a head, and a value head where the network has one.

    Raises:
      UserError: tensors are missing, misshaped, not targeted, or of modules that have no adapters here; all of them are listed.
    """
    found = _Found(adapter, config)
    if found.problems:
        raise UserError(f"{adapter}: {len(found.problems)} things in it do not fit the {config.family} model that it is read for: "
                        f"{'; '.join(found.problems)}; check that it was made for this model, or save it again with PEFT")
    settings, scales = found.settings()
    leaves: dict[str, Lazy] = dict(found.heads)
    for module, parts in found.adapters.values():
        leaves |= _leaves(module, parts, settings.rank, scales[module.name] / lora.scale(settings))
    dtype = np.dtype(np.float32)
    for path, (into, out) in lora.kernels(config).items():
        if path.rpartition("/")[2] in settings.projections and f"{path}/{lora.A}" not in leaves:
            for name, shape in ((lora.A, (into, settings.rank)), (lora.B, (settings.rank, out))):
                leaves[f"{path}/{name}"] = Lazy(shape, dtype, (((), functools.partial(np.zeros, shape, dtype)),))
    return settings, traverse_util.unflatten_dict(leaves, sep="/")


class _Found:
    """What a folder holds for a network, and all that is wrong with it."""

    def __init__(self, adapter: Adapter, config: ModelConfig) -> None:
        self.config, self.keys, self.problems = config, adapter.config, list[str]()
        self.adapters: dict[str, tuple[Module, dict[str, Tensor]]] = {}
        self.heads: dict[str, Lazy] = {}
        modules = adapted.modules(config)
        for given, tensor in adapter.tensors.items():
            name = families.renamed(config.family, given.removeprefix(PREFIX))
            match = _NAME.fullmatch(name)
            if not tensor.readable:
                self.problems.append(f"{given} is {tensor.kind} and not floating-point")
            elif not given.startswith(PREFIX):
                self.problems.append(f"{given} does not begin with {PREFIX!r}")
            elif match is None:
                self._head(given, name, tensor)
            elif match["module"] not in modules:
                self.problems.append(f"{given}: adapters lie beside projections of attention and dense MLPs only")
            else:
                parts = self.adapters.setdefault(match["module"], (modules[match["module"]], {}))[1]
                parts[PARTS[match["part"]]] = tensor
        for name, module in modules.items():
            self._check(name, module)
        self._value_head(adapter)
        if not self.adapters and not self.problems:
            self.problems.append("it holds no adapter")
        self._check_layers()

    def _head(self, given: str, name: str, tensor: Tensor) -> None:
        """A tensor that stands in the place of one of the base model's."""
        c = self.config
        shapes = {EMBEDDING: (c.vocab_size, c.hidden), LM_HEAD: (c.hidden, c.vocab_size), SCORE_HEAD: (c.hidden, 1)}
        rows = {row.theirs: row for row in (SCORE, *families.load(c.family).ROWS) if len(row.ours) == 1 and row.ours[0] in shapes}
        if name not in rows:
            self.problems.append(f"{given} is neither an adapter nor an embedding table or head")
            return
        row, path = rows[name], rows[name].ours[0]
        expected = row.join([np.broadcast_to(np.int8(0), shapes[path])], c).shape
        if path == SCORE_HEAD and "score" not in c.outputs:
            self.problems.append(f"{given} is a reward model's head, and a policy is read")
        elif path != SCORE_HEAD and c.tied:
            self.problems.append(f"{given} replaces one of two tensors that the model ties to each other")
        elif tensor.shape != expected:
            self.problems.append(f"{given} has shape {list(tensor.shape)} and not {list(expected)}")
        else:
            self.heads[path] = Lazy(shapes[path], tensor.dtype, (((), lambda: row.split(tensor.read(), c)[0]),))

    def _value_head(self, adapter: Adapter) -> None:
        if "value" not in self.config.outputs:
            return
        for name, shape in (("kernel", (self.config.hidden, 1)), ("bias", (1,))):
            tensor = (adapter.value_head or {}).get(name)
            if tensor is None or tensor.shape != shape or not tensor.readable:
                self.problems.append(f"{name} of {hf.VALUE_HEAD} is missing or not floating-point of shape {list(shape)}")
            else:
                self.heads[f"{VALUE_HEAD}/{name}"] = Lazy(shape, tensor.dtype, (((), tensor.read),))

    def _check(self, name: str, module: Module) -> None:
        """Notes what is wrong with one module's adapter."""
        targeted = self.keys.get("target_modules") is None or adapted.targeted(self.keys, name)
        if name not in self.adapters:
            if targeted and self.keys.get("target_modules") is not None:
                self.problems.append(f"{name} is among its target_modules and has no tensors")
            return
        if not targeted:
            self.problems.append(f"{name} has an adapter and is not among its target_modules")
        rank = adapted.by_pattern(self.keys.get("rank_pattern"), name, self.keys["r"])
        expected = {lora.A: (rank, module.into), lora.B: (module.out, rank)} | ({lora.MAGNITUDE: (module.out,)} if self.keys.get("use_dora") else {})
        parts = self.adapters[name][1]
        names = {part: suffix for suffix, part in reversed(PARTS.items())}
        for part in (*expected, *(parts.keys() - expected.keys())):
            if part not in parts:
                self.problems.append(f"{name}.{names[part]} is missing")
            elif part not in expected:
                self.problems.append(f"{name}.{names[part]} belongs to DoRA, and use_dora is not set")
            elif parts[part].shape != expected[part]:
                self.problems.append(f"{name}.{names[part]} has shape {list(parts[part].shape)} and not {list(expected[part])}")

    def _check_layers(self) -> None:
        """A layer without DoRA cannot be told from zeros: its magnitudes are the base kernel's norms, which are not at hand."""
        have = {path for module, _ in self.adapters.values() for path in module.ours}
        names = {path.rpartition("/")[2] for path in have}
        lacking = [path for path in lora.kernels(self.config) if path.rpartition("/")[2] in names and path not in have]
        if self.keys.get("use_dora") and lacking:
            self.problems.append(f"DoRA on some layers only is not built here, and {', '.join(lacking)} have none")

    def settings(self) -> tuple[Lora, dict[str, float]]:
        """Those of the module with the largest rank, and every module's scale."""
        rslora = bool(self.keys.get("use_rslora"))
        ranks = {name: parts[lora.A].shape[0] for name, (_, parts) in self.adapters.items()}
        alphas = {name: float(adapted.by_pattern(self.keys.get("alpha_pattern"), name, self.keys["lora_alpha"])) for name in ranks}
        scales = {name: alphas[name] / (math.sqrt(rank) if rslora else rank) for name, rank in ranks.items()}
        lead = max(ranks, key=lambda name: ranks[name])
        names = {path.rpartition("/")[2] for module, _ in self.adapters.values() for path in module.ours}
        settings = Lora(
            rank=ranks[lead], alpha=alphas[lead], targets="|".join(name for name in PROJECTIONS if name in names),
            dropout=float(self.keys.get("lora_dropout", 0.0)), rslora=rslora, dora=bool(self.keys.get("use_dora")),
        )
        return settings, scales


def _leaves(module: Module, parts: Mapping[str, Tensor], rank: int, ratio: float) -> dict[str, Lazy]:
    """A module's tensors as leaves of its projections, at this network's rank, B multiplied by `ratio`."""
    exact = math.isclose(ratio, 1.0, rel_tol=1e-12)

    def wide(x: np.ndarray, axis: int) -> np.ndarray:
        return np.pad(x, [(0, rank - x.shape[axis]) if i == axis else (0, 0) for i in range(2)])

    def read(part: str, index: int) -> np.ndarray:
        tensor = parts[part].read()
        if part == lora.A:
            return wide(tensor.T, 1)
        if part == lora.MAGNITUDE:
            return np.ascontiguousarray(module.split(tensor[:, None])[index][0])
        rows = wide(module.split(tensor)[index], 0)
        return rows if exact else rows.astype(np.float32) * np.float32(ratio)

    leaves = {}
    for index, (path, (into, out)) in enumerate(zip(module.ours, module.shapes)):
        for part, shape in ((lora.A, (into, rank)), (lora.B, (rank, out)), (lora.MAGNITUDE, (out,))):
            if part in parts:
                dtype = parts[part].dtype if part != lora.B or exact else np.dtype(np.float32)
                leaves[f"{path}/{part}"] = Lazy(shape, dtype, (((), functools.partial(read, part, index)),))
    return leaves
