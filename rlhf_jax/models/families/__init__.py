"""The families of models: each is a small file that says which fields of ModelConfig its config.json means and which tensor is which parameter.

    MODEL_TYPES  names in config.json; the first is written
    CLASSES      transformers' class by output ("lm", "score")
    FRESH        fields of ModelConfig that make a fresh network one of this family, where they differ from its defaults
    ROWS         the weight table
    IGNORED      regular expressions of tensors that hold nothing of the model's
    WHOLE_HEADS  whether transformers refuses a hidden size that heads do not divide
    RENAMED      (regular expression, replacement): other names under which checkpoints of this family were saved
    read(keys)   config.json → fields of ModelConfig, and `context` = max_position_embeddings
    write(config, stated)  the inverse; `stated` is max_position_embeddings as it was imported, 0 if not known

`read` and `write` below go through them. A family is found by name; there is no list to edit.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Mapping
from typing import Any, Protocol, cast

from rlhf_jax.errors import UserError, nearest
from rlhf_jax.models.config import RUNTIME, ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._shared import repeating
from rlhf_jax.models.hf.rows import Row

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class Family(Protocol):
    """What a module of this folder holds."""

    MODEL_TYPES: tuple[str, ...]
    CLASSES: dict[str, str]
    FRESH: dict[str, Any]
    ROWS: tuple[Row, ...]
    IGNORED: tuple[str, ...]
    RENAMED: tuple[tuple[str, str], ...]
    WHOLE_HEADS: bool

    def read(self, keys: Keys) -> dict[str, Any]:
        """Fields of ModelConfig, and `context`."""

    def write(self, config: ModelConfig, stated: int = 0) -> dict[str, Any]:
        """Keys of config.json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a config.json means."""

    family: str
    fields: dict[str, Any]  # of ModelConfig: its architecture, `family` among them; nothing of RUNTIME
    outputs: tuple[str, ...]  # ("lm",) or ("score",)
    longest: int  # max_position_embeddings, tokens
    left: list[str]  # keys that were not understood: for a warning
    notes: list[str]  # what the user should know

    @property
    def context(self) -> int:
        """The longest row for which this network is what transformers computes: tokens."""
        scaling = self.fields.get("rope_scaling")
        return min(self.longest, scaling.original_context) if scaling is not None and scaling.kind in ("dynamic", "longrope") else self.longest


def names() -> tuple[str, ...]:
    """The families there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def load(name: str) -> Family:
    """A family.

    Args:
      name: one of `names()`.

    Raises:
      UserError: no such family, with the nearest.
    """
    if name not in names():
        raise UserError(f"config.model.family = {name!r} is not a family of models{nearest(name, names())}")
    return cast(Family, importlib.import_module(f"{__name__}.{name}"))


def by_model_type(model_type: str, where: str = "config.json") -> str:
    """The name of the family of a config.json.

    Args:
      model_type: its `model_type`.
      where: the file, for messages.

    Raises:
      UserError: no family here has it, with those that there are.
    """
    types = {kind: name for name in names() for kind in load(name).MODEL_TYPES}
    if model_type not in types:
        close = nearest(model_type, types)
        raise UserError(f"{where}: model_type = {model_type!r} is not supported{close if close.startswith(' ') else ''}: only {', '.join(types)} are")
    return types[model_type]


def fresh(name: str) -> dict[str, Any]:
    """Fields of ModelConfig that make a fresh network one of this family, where they differ from ModelConfig's defaults."""
    return dict(load(name).FRESH)


def renamed(name: str, tensor: str) -> str:
    """A tensor's name in the family's table.

    Args:
      name: the family.
      tensor: its name in a checkpoint.
    """
    for pattern, replacement in load(name).RENAMED:
        tensor = re.sub(pattern, replacement, tensor)
    return tensor


def ignored(name: str, tensor: str) -> bool:
    """Whether a tensor of a checkpoint holds nothing of the model's."""
    return any(re.fullmatch(pattern, tensor) for pattern in load(name).IGNORED)


def read(values: Mapping[str, Any], where: str = "config.json") -> Reading:
    """What a config.json means, exactly as transformers 5.23 takes it, or an error.

    Args:
      values: its content.
      where: the file, for messages.

    Raises:
      UserError: an unknown model, a missing or contradictory key, or one that asks for what is not built here.
    """
    keys = Keys(values, where)
    family = by_model_type(keys.text("model_type"), where)
    outputs, fields = _outputs(keys), load(family).read(keys)
    longest = fields.pop("context")
    return Reading(family=family, fields={"family": family, **fields}, outputs=outputs, longest=longest, left=keys.left, notes=keys.notes)


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """The config.json of a network of ours; transformers 4 and 5 read it alike.

    Args:
      config: the network.
      stated: max_position_embeddings when the model was imported, tokens; 0 = not known: the network's context.

    Raises:
      UserError: transformers' class of its family cannot be this network.
    """
    if fields := unsupported(config, config.family):
        raise UserError(
            f"config.model.{', config.model.'.join(fields)}: transformers' {load(config.family).CLASSES['lm']} cannot express "
            f"{' or '.join(repr(getattr(config, field)) for field in fields)}, so that this network has no Hugging Face form as a {config.family}"
        )
    return load(config.family).write(config, stated)


def unsupported(config: ModelConfig, family: str) -> list[str]:
    """Fields of ModelConfig in which transformers' class of the family cannot follow a network.

    Args:
      config: the network.
      family: one of `names()`.
    """
    module = load(family)
    if module.WHOLE_HEADS and config.hidden % config.heads:
        return ["heads"]
    try:
        fields = module.read(Keys(module.write(config)))
    except UserError:  # heads apart, a scaling is all that a family's reader can refuse of what its writer says
        return ["rope_scaling"]
    kept = {key: getattr(config, key) for key in (*RUNTIME, "outputs", "lora", "quantise", "balance_coef", "family")}
    back = ModelConfig(**kept | {key: value for key, value in fields.items() if key not in kept})
    unused = ["mlp"] if all(back.kind(i)[1] for i in range(back.layers)) else []
    unused += ["rope_theta", "rope_scaling", "local_rope_theta", "rotary_dim"] if config.position == "learned" else []
    back = dataclasses.replace(back, **{key: getattr(config, key) for key in unused})
    return _canonical(config).difference(_canonical(back))


def _outputs(keys: Keys) -> tuple[str, ...]:
    """Which head the checkpoint has."""
    classes = keys.texts("architectures")
    if not classes or classes[0].endswith(CAUSAL):
        return ("lm",)
    if not classes[0].endswith("ForSequenceClassification"):
        raise keys.refusal("architectures", "only causal language models and sequence classifiers of one label are read here")
    count = len(keys.mapping("id2label")) or keys.whole("num_labels", 2)
    if count != 1:
        raise keys.refusal("id2label", f"a classifier of {count} labels is not a reward model: train one with num_labels = 1")
    return ("score",)


def _canonical(config: ModelConfig) -> ModelConfig:
    """The same network with what it does not use, or says in two ways, at one value."""
    kinds = [config.kind(i) for i in range(config.layers)]
    windows, dense = repeating([window for window, _ in kinds]), repeating([not experts for _, experts in kinds])
    changes: dict[str, Any] = {"windows": windows, "dense": dense}
    if config.attention_scale == config.head_dim**-0.5:
        changes["attention_scale"] = 0.0
    if config.rotary_dim == config.head_dim:
        changes["rotary_dim"] = 0
    if config.position == "rope":
        changes["positions"] = 0
    if scaling := config.rope_scaling:
        original = 0 if scaling.kind == "linear" else scaling.original_context or config.context
        changes["rope_scaling"] = dataclasses.replace(scaling, original_context=original)
    if not any(windows) or (config.local_rope_theta == config.rope_theta and not config.rope_scaling):
        changes["local_rope_theta"] = 0.0
    if all(dense):
        changes |= {"experts": 0, "experts_per_token": 0, "expert_mlp": 0, "renormalise": True, "dense": (False,)}
    return dataclasses.replace(config, **changes)
