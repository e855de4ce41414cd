"""A parameter tree as a Hugging Face directory: config.json, safetensors shards and their index, extra files, SHA256SUMS.

The family's table is walked in its order; one tensor at a time is gathered to the host, joined, cast and written, so that neither the network nor a
shard is ever whole in memory. All is written into a folder beside the target, which takes its place at the end: a target is whole or not there.
Deviation from transformers: one dtype for all tensors; a value head, which its architectures do not have, lies in a file of its own, in float32.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf import directory as hf
from rlhf_jax.models.hf import safetensors
from rlhf_jax.models.hf.rows import VALUE_HEAD, Placement, Row, expand
from rlhf_jax.types import PyTree

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}
SHARD_BYTES = 5 * 2**30
METADATA = {"format": "pt", "producer": "rlhf_jax"}  # in every file's header; by the second an export is known again


def write_directory(
    folder: str | os.PathLike[str], rows: Sequence[Row], config: ModelConfig, params: PyTree, *, dtype: str, config_json: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None, extra_files: Mapping[str, bytes] | None = None, shard_bytes: int = SHARD_BYTES,
    key: str = "--to-hf",
) -> None:
    """Writes a model directory, whole or not at all.

    Args:
      folder: the target: absent, empty, or an earlier export, which is replaced.
      rows: the family's table.
      config: the network.
      params: its canonical tree; NumPy arrays, `Lazy`s or jax arrays on any sharding of this process. Adapters are merged before.
      dtype: "float32", "bfloat16" or "float16".
      config_json: what `config.json` says; the dtype is added under transformers 4's name and 5's.
      generation_config: what `generation_config.json` says; None leaves it out.
      extra_files: further files by plain name: tokenizer, chat template.
      shard_bytes: a shard is closed before it would exceed this many bytes; a larger tensor has one of its own.
      key: the flag that named the folder, for messages.

    Raises:
      UserError: the folder holds something else, the disk is too full, a parameter has no place in the family, or a value none in the dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    target = Path(folder).resolve()
    outputs, value_head = plan(rows, config, params, DTYPES[dtype])
    files = {hf.CONFIG: _json({**config_json, "torch_dtype": dtype, "dtype": dtype})}
    if generation_config is not None:
        files[hf.GENERATION] = _json(generation_config)
    for name, content in (extra_files or {}).items():
        if name in files or name == hf.SUMS or name.endswith((".safetensors", ".safetensors.index.json")) or os.path.basename(name) != name:
            raise ValueError(f"extra file {name!r} is not a plain name, or the export writes it itself")
        files[name] = content
    _check_target(target, key)
    _check_space(target, sum(output.size for output in (*outputs, *value_head)) + sum(map(len, files.values())), key)
    with _replacing(target, key) as partial:
        sums = _write_weights(partial, outputs, shard_bytes)
        if value_head:
            sums[hf.VALUE_HEAD] = safetensors.write(partial / hf.VALUE_HEAD, value_head, METADATA)
        for name, content in files.items():
            sums[name] = _write_bytes(partial / name, content)
        _write_bytes(partial / hf.SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode())


def plan(rows: Sequence[Row], config: ModelConfig, params: PyTree, dtype: np.dtype) -> tuple[list[safetensors.Output], list[safetensors.Output]]:
    """The tensors of a directory in the table's order, and those of the value head's own file; nothing is read.

    Args:
      rows: the family's table.
      config: the network.
      params: its canonical tree.
      dtype: of the tensors.

    Raises:
      UserError: parameters that no row holds.
      ValueError: layers are missing from the tree.
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    if set(params["layers"]) != {str(i) for i in range(config.layers)}:
        raise ValueError(f"{config.layers} layers are expected under 'layers', in the canonical layout; found {sorted(params['layers'])}")
    own = {path: leaf for path, leaf in leaves.items() if path.startswith(f"{VALUE_HEAD}/")}
    placements = expand(rows, config, leaves.keys() - own.keys())
    if homeless := leaves.keys() - own.keys() - {path for placement in placements for path in placement.ours}:
        raise UserError(
            f"a {config.family} checkpoint has no place for {', '.join(sorted(homeless))}: merge adapters and dequantise kernels first, or choose "
            "the family that the model is of"
        )
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    outputs = []
    for placement in placements:
        shape = placement.shape(shapes, config)
        for index, name in enumerate(placement.theirs):
            outputs.append(safetensors.Output(name, dtype, shape, functools.partial(_joined, placement, leaves, index, config)))
    value_head = [
        safetensors.Output(path.rpartition("/")[2], DTYPES["float32"], shapes[path], functools.partial(on_host, leaf)) for path, leaf in own.items()
    ]
    return outputs, value_head


def on_host(leaf: Any) -> np.ndarray:
    """A parameter's values, a jax array's shard by shard.

    Args:
      leaf: a NumPy array, a `Lazy`, or a jax array of this process.

    Raises:
      ValueError: another process holds some of the shards.
    """
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not leaf.is_fully_addressable:
        raise ValueError("an array on several hosts cannot be exported from one: export a checkpoint instead")
    # A copy on the device first: a host's copy is cached in the array that it is taken of and would live as long as the network; on CPU it would be a
    # view that pins the buffer.
    if leaf.is_fully_replicated:
        return np.asarray(jnp.copy(leaf.addressable_data(0)))
    whole = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = np.asarray(jnp.copy(shard.data))
    return whole


def _joined(placement: Placement, leaves: Mapping[str, Any], index: int, config: ModelConfig) -> np.ndarray:
    """One tensor of theirs, from the parameters (or from their expert `index`) that it holds."""
    parts = (leaves[path][index] if placement.per_expert else leaves[path] for path in placement.ours)
    return placement.row.join([on_host(part) for part in parts], config)


def _write_weights(folder: Path, outputs: Sequence[safetensors.Output], shard_bytes: int) -> dict[str, str]:
    """One file, or shards and their index. Returns the digest of each file."""
    shards: list[list[safetensors.Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.size
    if len(shards) == 1:
        return {hf.WEIGHTS: safetensors.write(folder / hf.WEIGHTS, outputs, METADATA)}
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(output.size for output in outputs)},
        "weight_map": {output.name: name for name, shard in zip(names, shards) for output in shard},
    }
    sums = {name: safetensors.write(folder / name, shard, METADATA) for name, shard in zip(names, shards)}
    return sums | {hf.INDEX: _write_bytes(folder / hf.INDEX, _json(index))}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _write_bytes(path: Path, content: bytes) -> str:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


# --- the target ---


def _check_target(target: Path, key: str) -> None:
    """Refuses to replace anything but an export of ours, to which nothing was added."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{key} = {str(target)!r} is a file: name a folder")
    entries = sorted(target.iterdir()) if target.is_dir() else []
    weights = [entry for entry in entries if entry.name.endswith(".safetensors")]
    listed = {*hf.read_sums(target / hf.SUMS), hf.SUMS} if weights and all(map(_produced_here, weights)) else set()
    if strangers := [entry.name for entry in entries if entry.name not in listed or not entry.is_file()]:
        shown = ", ".join(strangers[:5]) + (" …" if len(strangers) > 5 else "")
        raise UserError(f"{key} = {str(target)!r} holds files that are not of an export ({shown}): name a new folder, or empty this one")


def _produced_here(path: Path) -> bool:
    try:
        return safetensors.read_metadata(path).get("producer") == METADATA["producer"]
    except UserError:
        return False


def _check_space(target: Path, needed: int, key: str) -> None:
    """Refuses to start what the disk cannot take; an earlier export is removed only afterwards."""
    there = next(folder for folder in target.parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(f"{key} = {str(target)!r} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: make room, or name another")


@contextlib.contextmanager
def _replacing(target: Path, key: str) -> Iterator[Path]:
    """A new folder beside the target that takes its place when the block ends well, and vanishes when it does not."""
    beside: Callable[[str], Path] = lambda what: target.parent / f".{target.name}.{what}-{uuid.uuid4().hex[:8]}"  # noqa: E731
    partial, old = beside("partial"), beside("old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        raise UserError(f"{key} = {str(target)!r} could not be written ({error}); check the disk's space and the folder's permissions") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
