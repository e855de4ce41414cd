"""A run assembled from shapes alone: no data, no checkpoint and no device is needed to know what it will compile.

What the config names and is here is opened, as far as shapes, tokenizers and architectures go. What is not here is stood in for: a network by one of
config.model's architecture, a tokenizer by bytes, data by batches of the largest shapes that the config allows. `Outline.notes` says which.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, layout, transformer
from rlhf_jax.models.lazy import Lazy
from rlhf_jax.objectives import Objective
from rlhf_jax.saved import Source, load_source
from rlhf_jax.train import schedule
from rlhf_jax.train.assemble import Experiment, Site, assemble
from rlhf_jax.train.config import INHERIT, fresh_model
from rlhf_jax.types import Comparisons, Labelled, Prompts, PyTree, Sequences, Unpaired

BRANCHES = 2  # responses of a comparison


def outline(config: Mapping[str, Any], objective: Objective, mesh: Mesh) -> tuple[Experiment, list[str]]:
    """The run as `assemble` would build it, every array a shape on its sharding; and what was stood in for, a sentence each.

    Args:
      config: checked (train.config.check, files=False).
      objective: bound.
      mesh: of the devices that it is compiled for.

    Raises:
      UserError: sizes that do not fit together, as at the start of the run itself.
    """
    stand_in = _StandIns(config)
    tokenizer = config["tokenizer"]
    if tokenizer["kind"] == "bpe" or (tokenizer["kind"] == "file" and not os.path.exists(tokenizer["path"])):
        config = {**config, "tokenizer": {**tokenizer, "kind": "byte"}}
        stand_in.notes.append(f"config.tokenizer.kind = {tokenizer['kind']!r}: bytes stand for it")
    if not config["init_from"] and tokenizer["kind"] == INHERIT:
        config = {**config, "tokenizer": {**tokenizer, "kind": "byte"}}
        stand_in.notes.append("config.init_from is empty: bytes stand for its tokenizer")
    if config["model"]["add_tokens"] and not os.path.exists(config["init_from"]):
        config = {**config, "model": {**config["model"], "add_tokens": ()}}
        stand_in.notes.append("config.model.add_tokens is left out: config.init_from, whose tokenizer it grows, is not here")
    if config["data"]["template"] == INHERIT and not (config["init_from"] and os.path.exists(config["init_from"])):
        config = {**config, "data": {**config["data"], "template": "plain"}}
    site = Site(source=stand_in.source, place=shapes, datasets=functools.partial(_datasets, objective, mesh), mesh=mesh, real=False)
    return assemble(config, objective, site=site), stand_in.notes


def shapes(params: PyTree, config: ModelConfig, mesh: Mesh) -> PyTree:
    """What `saved.place` would give, as shapes; `params` are not looked at.

    Args:
      params: of the network.
      config: the network.
      mesh: where.
    """
    found = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    where = sharding.parameter_shardings(mesh, transformer.logical_axes(config), found)
    return jax.tree.map(sharding.placed, found, where)


class _StandIns:
    """Opens what is here; what is not gets the architecture that config.model writes out."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config, self.notes = config, list[str]()

    def source(self, path: str, key: str, **options: Any) -> Source:
        if "://" not in path and os.path.exists(path):
            return load_source(path, key, **options)
        if self._config["model"]["family"] == INHERIT:
            raise UserError(f"{key} = {path!r} is not here, and config.model.family = 'inherit' takes its architecture from there: name a copy "
                            "(its weights are not read), or write the architecture out in config.model")
        role = "reward" if key.endswith("reward_from") or (key.endswith(".run") and not self._implicit(key)) else "policy"
        outputs = ("score",) if role == "reward" else ("lm",)
        model = fresh_model(self._config["model"], outputs)
        tree = layout.to_canonical(jax.eval_shape(functools.partial(transformer.init, model), jax.random.key(0)))
        unread = jax.tree.map(lambda leaf: Lazy(tuple(leaf.shape), np.dtype(leaf.dtype), (((), _never),)), tree)
        tokenizer = Tokenizer.byte_level()
        template = ChatTemplate.load("plain", variables=tokenizer.variables)
        self.notes.append(f"{key} = {path!r} is not here: a network of config.model's architecture stands for it")
        meta = {"network": role, "longest": model.context, "reward_mean": 0.0, "reward_std": 1.0}
        return Source(path, path, role, model, unread, meta, tokenizer, template)

    def _implicit(self, key: str) -> bool:
        entry = self._config.get("rewards", ())[int(key[key.index("[") + 1 : key.index("]")])]
        return entry["name"] == "implicit"


def _never() -> np.ndarray:
    raise AssertionError("the weights of a network that only its shape is known of were read")


@dataclasses.dataclass(frozen=True)
class _Batches:
    """A data set of one batch of zeros, the same for every index."""

    rows: PyTree

    def batch(self, index: int, seed: int) -> PyTree:
        return self.rows

    def batches_for(self, epochs: float, seed: int) -> int:
        return 1


def _datasets(objective: Objective, mesh: Mesh, config: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate, where: Any
              ) -> tuple[Any, Any, Any]:
    """The training set, no validation set, and the second training set where there is one, in the largest shapes that the config allows; of each
    the rows of one host."""
    blocks, parts = sharding.host_rows(mesh)
    section, mine = config["data"], lambda rows: rows * len(blocks) // parts
    count = mine(config["run"]["batch_size"])
    if section["kind"] == "prompt":
        train: PyTree = _prompts(mine(config["run"]["batch_size"] - schedule.replayed_rows(config)), section["prompt_length"])
    else:
        train = _rows(objective.batch_type, count, section["max_length"])
    second = config.get("ptx")
    ptx = _Batches(_sequences((count, second["max_length"]))) if second else None
    return _Batches(train), None, ptx


def _zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    return np.broadcast_to(np.zeros((), dtype), shape)  # no memory


def _sequences(shape: tuple[int, ...]) -> Sequences:
    ids = _zeros(shape, np.int32)
    return Sequences(tokens=ids, positions=ids, segment_ids=ids, loss_mask=_zeros(shape, bool))


def _rows(kind: type, count: int, length: int) -> PyTree:
    if kind is Comparisons:
        return Comparisons(seqs=_sequences((count, BRANCHES, length)))
    if kind is Unpaired:
        return Unpaired(seqs=_sequences((count, length)), desirable=_zeros((count,), bool), kl_seqs=_sequences((count, length)))
    if kind is Labelled:
        targets = _zeros((count, length), np.float32)
        return Labelled(seqs=_sequences((count, length)), targets=targets, weights=targets)
    return _sequences((count, length))


def _prompts(count: int, length: int) -> Prompts:
    ids, row = _zeros((count, length), np.int32), _zeros((count,), np.int32)
    return Prompts(tokens=ids, positions=ids, segment_ids=ids, prompt_ids=row, sample_ids=row, group_ids=row)
