"""What the commands that open a saved network do alike: the flags for its context, precision, template and devices, and new folders."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from jax.sharding import Mesh

from rlhf_jax.data.hf_tokenizer import fitted
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig
from rlhf_jax.saved import Source, chat_template, load_source


def chosen(config: ModelConfig, context: int, dtype: str) -> ModelConfig:
    """The network with another context and precision of computation.

    Args:
      config: as it was saved.
      context: --context, tokens; 0 keeps the network's.
      dtype: --dtype; "" keeps the network's.

    Raises:
      UserError: the network cannot read so many tokens.
    """
    try:
        config = dataclasses.replace(config, context=context or config.context)
    except UserError as error:
        raise UserError(f"--context = {context}: {str(error).partition(': ')[2]}") from None
    return dataclasses.replace(config, compute_dtype=dtype or config.compute_dtype)


def with_template(source: Source, name: str) -> Source:
    """The same network with the chat template that --template names, whose end of a turn becomes the tokenizer's.

    Args:
      source: the network.
      name: a shipped template, a file, or "" for the model's own.

    Raises:
      UserError: there is no such template.
    """
    if not name or source.tokenizer is None:
        return source
    try:
        template = chat_template(name, source.tokenizer)
    except UserError as error:
        raise UserError(f"--template = {name!r}: {error}") from None
    return dataclasses.replace(source, template=template, tokenizer=fitted(source.tokenizer, template))


def conversing(path: str, flag: str, template: str) -> Source:
    """A saved network that reads conversations.

    Args:
      path: as for `load_source`.
      flag: that named it, for messages.
      template: as for `with_template`.

    Raises:
      UserError: nothing to open, or a base model without a template.
    """
    source = with_template(load_source(path, flag), template)
    source.reader(flag)
    if source.template is None:
        raise UserError(f"{flag} = {path!r} has no chat template: it is a base model; name one with --template, for example roles")
    return source


@contextlib.contextmanager
def meshed(fsdp: int, tensor: int) -> Iterator[Mesh]:
    """The mesh of `fsdp` × `tensor` devices, for placing a network in the block.

    Args:
      fsdp, tensor: the flags' values.

    Raises:
      UserError: there are not as many devices, or they do not divide the network.
    """
    import jax

    from rlhf_jax import distributed

    if fsdp * tensor > len(jax.devices()):
        raise UserError(f"--fsdp = {fsdp} and --tensor = {tensor} need {fsdp * tensor} devices, and {len(jax.devices())} are here: lower them")
    try:
        yield distributed.make_mesh({"fsdp": fsdp, "tensor": tensor}, devices=fsdp * tensor)
    except UserError as error:
        raise UserError(str(error).replace("config.mesh.", "--")) from None


@contextlib.contextmanager
def new_folder(target: str, flag: str) -> Iterator[pathlib.Path]:
    """A folder beside the target that takes its place when the block ends well, and vanishes when it does not.

    Args:
      target: absent, or an empty folder.
      flag: that named it, for messages.

    Raises:
      UserError: something is there, or the target is not on this machine.
    """
    path = pathlib.Path(target).expanduser().resolve()
    if "://" in target:
        raise UserError(f"{flag} = {target!r}: name a local folder, and copy it from there")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag} = {target!r} exists and is not empty: name a new folder")
    part = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        part.mkdir(parents=True)
        yield part
        if path.exists():
            path.rmdir()
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
