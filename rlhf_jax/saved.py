"""A saved network as a later run, the sampler or the evaluation wants it: parameters, architecture, tokenizer and chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from rlhf_jax import checkpoint
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig
from rlhf_jax.types import PyTree

TOKENIZER, TEMPLATE = "tokenizer.json", "template.jinja"  # files of a run's workdir


@dataclasses.dataclass(frozen=True)
class Source:
    """One saved network. `params` is in the canonical layout, on the host."""

    path: str
    network: str  # "policy" or "reward"
    config: ModelConfig
    params: PyTree
    meta: Mapping[str, Any]
    tokenizer: Tokenizer
    template: str  # path of the chat template's file

    def chat_template(self) -> ChatTemplate:
        """The template, with the tokenizer's control tokens as its variables."""
        return chat_template(self.template, self.tokenizer)


def chat_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A shipped template by name, or one from a file."""
    return ChatTemplate.load(name, variables={"bos_token": tokenizer.bos, "eos_token": tokenizer.end, "pad_token": tokenizer.pad})


def load_source(path: str, key: str, *, which: Any = "latest") -> Source:
    """Opens a run or checkpoint.

    Args:
      path: a workdir, a folder of checkpoints, or one step.
      key: the config key or flag that named it, for messages.
      which: "latest", "best" or a step, where `path` is a workdir.

    Raises:
      UserError: nothing there, damaged, or not a checkpoint of ours.
    """
    params, meta = checkpoint.load_params(path, key=key, which=which)
    for field in ("network", "model"):
        if field not in meta:
            raise UserError(f"{key} = {path!r} holds no {field!r} in its meta: it is not a checkpoint of rlhf-jax train")
    folder = epath.Path(path)
    for place in (folder, *list(folder.parents)[:2]):
        if (place / TOKENIZER).exists() and (place / TEMPLATE).exists():
            tokenizer = Tokenizer.load(place / TOKENIZER, **meta.get("control_tokens", {}))
            name = meta["network"]
            return Source(str(path), name, ModelConfig.from_json(meta["model"]), params[name], meta, tokenizer, str(place / TEMPLATE))
    raise UserError(f"{key} = {path!r}: no {TOKENIZER} and {TEMPLATE} beside the checkpoint; name the run's workdir")
