"""A saved network as a later run, the sampler or the evaluation wants it: parameters, architecture, tokenizer and chat template.

`load_source` opens a run's checkpoint, a Hugging Face directory, or either with adapters on top; what it returns is the same. Parameters on disk are
read when they are placed (`place`), tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from rlhf_jax import checkpoint, sharding
from rlhf_jax.data import hf_tokenizer
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, layout, lora, transformer
from rlhf_jax.models.adopt import HEADS, adopt, missing
from rlhf_jax.models.config import Lora
from rlhf_jax.models.hf.directory import fingerprint, is_directory
from rlhf_jax.models.hf.network import open_network
from rlhf_jax.models.hf.peft import is_adapter, open_adapter, read_adapter
from rlhf_jax.models.lazy import Lazy
from rlhf_jax.models.networks import merge
from rlhf_jax.types import PyTree

TOKENIZER, TEMPLATE, CONFIG = "tokenizer.json", "template.jinja", "config.json"  # files of a run's workdir
PROVENANCE = ("longest", "generation")  # of a Hugging Face directory: max_position_embeddings, generation_config.json
TABLES = ("embedding", "lm_head")  # leaves of `ends` with an axis of tokens: rows of the one, columns of the other


@dataclasses.dataclass(frozen=True)
class Source:
    """One saved network. `params` is in the canonical layout; its leaves are NumPy arrays, or not read yet (models.lazy)."""

    path: str  # as it was named
    origin: str  # the step's or the directory's own absolute path
    network: str  # "policy" or "reward"
    config: ModelConfig
    params: PyTree
    meta: Mapping[str, Any]
    tokenizer: Tokenizer | None  # None: it has none, and reads token ids
    template: ChatTemplate | None  # None: a base model, which has never seen a conversation

    def reader(self, key: str) -> Tokenizer:
        """The tokenizer, for a caller that reads or writes text.

        Args:
          key: the config key or flag that named the source.

        Raises:
          UserError: there is none.
        """
        if self.tokenizer is None:
            raise UserError(f"{key} = {self.path!r} has no {TOKENIZER}, and text is to be read or written: put the model's own there")
        return self.tokenizer

    def layout(self, key: str) -> ChatTemplate:
        """The chat template, for a caller that reads conversations; arguments and errors as for `reader`."""
        if self.template is None:
            raise UserError(f"{key} = {self.path!r} has no chat template: it is a base model, to be trained on conversations first")
        return self.template

    def for_adapters(self, settings: Lora | None) -> Source:
        """The same network for a run with these adapters: its own go on being trained if they are of the same kind, else they are merged.

        Args:
          settings: of the run; None = without adapters.
        """
        own = self.config.lora
        if own is None or own.alike(settings):
            return self
        return dataclasses.replace(self, config=dataclasses.replace(self.config, lora=None, quantise="none"),
                                   params=lora.merged(self.params, own))

    def with_tokens(self, tokenizer: Tokenizer) -> Source:
        """The same network reading a tokenizer that knows more tokens: the new ones' rows are the mean of the others (Hewitt 2021).

        Args:
          tokenizer: this one's, with further tokens behind its own.
        """
        assert self.tokenizer is not None
        old, new = min(self.tokenizer.vocab_size, self.config.vocab_size), tokenizer.vocab_size
        size = max(new, self.config.vocab_size)

        def grown(leaf: Any, axis: int) -> Lazy:
            def grow(whole: np.ndarray) -> np.ndarray:
                rows = np.moveaxis(np.asarray(whole), axis, 0)
                mean = rows[:old].mean(0, dtype=np.float64).astype(rows.dtype)
                made = np.concatenate([rows[:old], np.repeat(mean[None], new - old, axis=0), rows[new:]])
                return np.ascontiguousarray(np.moveaxis(made, 0, axis))

            lazy = Lazy.of(leaf)
            return lazy.map(grow, tuple(size if i == axis else n for i, n in enumerate(lazy.shape)), lazy.dtype)

        ends = {name: grown(leaf, TABLES.index(name)) if name in TABLES else leaf for name, leaf in self.params["ends"].items()}
        config = dataclasses.replace(self.config, vocab_size=size)
        return dataclasses.replace(self, tokenizer=tokenizer, config=config, params={**self.params, "ends": ends})


def place(params: PyTree, config: ModelConfig, mesh: Mesh) -> PyTree:
    """A network's parameters on their shardings, in the running layout; heads that `config` has not are left on disk.

    Args:
      params: canonical, NumPy arrays or not read yet.
      config: the network.
      mesh: where.

    Raises:
      UserError: parameters are missing or misshaped.
    """
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    where = sharding.parameter_shardings(mesh, transformer.logical_axes(config), shapes)
    found = adopt(layout.to_canonical(shapes), params, config)
    if absent := missing(found):
        raise UserError(f"the checkpoint lacks parameters of the network: {', '.join(absent)}")
    return jax.tree.map(lambda shape, leaf, at: sharding.place(leaf, at, shape.dtype), shapes, layout.to_runtime(found, config.unit), where)


def chat_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A shipped template by name, or one from a file."""
    return ChatTemplate.load(name, variables=tokenizer.variables)


def load_source(path: str, key: str, *, which: Any = "latest", grows: bool = False) -> Source:
    """Opens a run, a checkpoint of one, or a Hugging Face directory.

    Args:
      path: a workdir, a folder of checkpoints, one step, a model's directory, or an adapter's of PEFT.
      key: the config key or flag that named it, for messages.
      which: "latest", "best" or a step, where `path` is a workdir.
      grows: the caller will call `with_tokens`, so that a directory's tokenizer may know more tokens than its network.

    Raises:
      UserError: nothing there, damaged, or nothing that can be opened.
    """
    if "://" not in path and is_adapter(path):
        return _from_adapter(path, key)
    if "://" not in path and is_directory(path) and not checkpoint.is_run(path):
        return _from_directory(path, key, grows)
    params, meta = checkpoint.load_params(path, key=key, which=which)
    for field in ("network", "model"):
        if field not in meta:
            raise UserError(f"{key} = {path!r} holds no {field!r} in its meta: it is not a checkpoint of rlhf-jax train")
    folder, name = epath.Path(path), meta["network"]
    home = next((place for place in (folder, *list(folder.parents)[:2]) if (place / CONFIG).exists()), None)
    if home is None:
        raise UserError(f"{key} = {path!r}: no {CONFIG} beside the checkpoint; name the run's workdir")
    tokenizer = Tokenizer.load(home / TOKENIZER, **meta.get("control_tokens", {})) if (home / TOKENIZER).exists() else None
    template = None
    if tokenizer is not None and (home / TEMPLATE).exists():
        template = ChatTemplate((home / TEMPLATE).read_text(), name=str(home / TEMPLATE), variables=tokenizer.variables)
    source = Source(str(path), meta["checkpoint"], name, ModelConfig.from_json(meta["model"]), params.get(name, {}), meta, tokenizer, template)
    return _on_base(source, key) if "base" in meta else source


def _on_base(source: Source, key: str) -> Source:
    """A checkpoint of adapters, merged into the tree of the checkpoint that they lie on."""
    home = source.meta["base"]
    try:
        base = load_source(home, key)
    except UserError as error:
        raise UserError(f"{key} = {source.path!r} holds adapters for {home!r}, which cannot be opened ({error}): put it back") from error
    if (began := source.meta.get("init_fingerprint")) and began != base.meta.get("fingerprint"):
        raise UserError(f"{key} = {source.path!r} holds adapters for {home!r}, whose weights have changed since they were trained: put the former "
                        "ones back")
    if source.tokenizer is not None and base.tokenizer is not None and base.tokenizer.vocab_size < source.tokenizer.vocab_size:
        base = base.with_tokens(source.tokenizer)
    base = base.for_adapters(source.config.lora)  # as when they were trained: a run's own ones that went on are not merged besides
    if different := source.config.difference(base.config):
        raise UserError(f"{key} = {source.path!r} holds adapters for another network than {home!r} is now: {', '.join(different)} differ")
    return dataclasses.replace(source, params=_without_strange_heads(merge(source.params, base.params), source.config))


def _without_strange_heads(params: PyTree, config: ModelConfig) -> PyTree:
    """The tree without the heads that its base has and the network has not: a reward model's base brings an output matrix."""
    own = {f"{output}_head" for output in config.outputs}
    return {**params, "ends": {name: leaf for name, leaf in params["ends"].items() if name not in HEADS or name in own}}


def _from_directory(path: str, key: str, grows: bool) -> Source:
    """A Hugging Face directory; without a tokenizer it serves token ids alone."""
    opened = open_network(path, key)
    for note in opened.notes:
        logging.warning("%s: %s", path, note)
    directory = opened.directory
    tokenizer, template = hf_tokenizer.read(str(directory.path))
    generation = dict(directory.generation or {})
    if tokenizer is not None:
        declared = {"config.json": directory.config, "generation_config.json": generation}
        size = max(tokenizer.vocab_size, opened.config.vocab_size) if grows else opened.config.vocab_size
        hf_tokenizer.check_fits(tokenizer, declared, size, f"{key} = {path!r}")
    meta = {"network": opened.network, "longest": opened.longest, "generation": generation, "fingerprint": fingerprint(directory)}
    return Source(path, str(directory.path.resolve()), opened.network, opened.config, opened.params, meta, tokenizer, template)


def _from_adapter(path: str, key: str) -> Source:
    """PEFT's adapters on the model that their adapter_config.json names: a folder, as seen from here or from the adapters' own."""
    opened = open_adapter(path, key)
    places = (opened.base, os.path.join(path, opened.base)) if opened.base else ()
    home = next((place for place in places if os.path.isdir(place)), None)
    if home is None:
        raise UserError(f"{opened} lies on base_model_name_or_path = {opened.base!r}, and no such folder is here: download that model, and name its "
                        "folder there")
    base = load_source(home, key).for_adapters(None)
    outputs = ("score",) if opened.network == "reward" else ("lm", "value") if opened.value_head else ("lm",)
    config = dataclasses.replace(base.config, outputs=outputs)
    settings, leaves = read_adapter(opened, config)
    tokenizer, template = hf_tokenizer.read(path)
    if tokenizer is not None:
        hf_tokenizer.check_fits(tokenizer, {}, config.vocab_size, str(opened))
    meta = {**{name: base.meta[name] for name in PROVENANCE if name in base.meta}, "network": opened.network, "base": base.origin}
    return Source(
        path, os.path.realpath(path), opened.network, dataclasses.replace(config, lora=settings),
        _without_strange_heads(merge(leaves, base.params), config), meta, tokenizer or base.tokenizer, template or base.template,
    )
