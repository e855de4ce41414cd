"""A Hugging Face directory as a network: its config.json read by its family, its tensors as parameters that are not read yet."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models import families, transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf.directory import Directory, open_directory
from rlhf_jax.models.hf.tensors import read_params
from rlhf_jax.types import PyTree

CONTEXT = 4096  # tokens, where the run that opens it does not choose
RUNTIME: dict[str, Any] = dict(dropout=0.0, compute_dtype="float32", scan_layers=True, remat="none", logits_chunk=512)


@dataclasses.dataclass(frozen=True)
class Network:
    """What an opened directory holds."""

    directory: Directory
    network: str  # "policy" or "reward"
    config: ModelConfig
    params: PyTree  # canonical, not read yet
    longest: int  # max_position_embeddings, tokens
    notes: tuple[str, ...]  # what the user should know about how it was read


def open_network(path: str, key: str) -> Network:
    """Opens a directory; headers are read, no tensor.

    Args:
      path: of the directory.
      key: the config key or flag that named it, for messages.

    Raises:
      UserError: a file is missing or damaged, the family is not supported, config.json asks for what is not built here, or tensors do not fit.
    """
    source = open_directory(path, key)
    reading = families.read(source.config, where=f"{key} = {str(path)!r}: config.json")
    outputs = (*reading.outputs, "value") if source.value_head else reading.outputs
    for name in ("layers", "experts"):  # before anything is made for each of them
        if (count := reading.fields.get(name, 0)) > len(source.tensors):
            raise UserError(f"{source}: config.json states {count} {name}, and its files hold {len(source.tensors)} tensors: check that they belong "
                            "together")
    config = ModelConfig(**{**RUNTIME, **reading.fields}, outputs=outputs, context=min(reading.context, CONTEXT), param_dtype="float32")
    abstract = jax.eval_shape(functools.partial(transformer.init, dataclasses.replace(config, scan_layers=False)), jax.random.key(0))
    family = families.load(reading.family)
    params = read_params(source, family.ROWS, config, abstract, ignored=family.IGNORED, renamed=family.RENAMED)
    if {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}:  # float16 has more digits than bfloat16
        config = dataclasses.replace(config, param_dtype="bfloat16")
    notes = (*reading.notes, *(f"config.json's {name} is not known here and was not used" for name in reading.left))
    return Network(source, "reward" if "score" in outputs else "policy", config, params, reading.longest, notes)
