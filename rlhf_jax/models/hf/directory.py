"""A Hugging Face model directory, opened and checked before a tensor is read: config.json, weight files, their index, their digests.

Only safetensors are read: pickled weights run the code that is in them. `SHA256SUMS`, which our exports carry, is verified where it is there.
A shard is a plain file name of the directory. It may be a symbolic link within the directory, or into the `blobs` of the hub's cache, whose
snapshots are made of such links; no other link is followed out of the directory.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models.hf.safetensors import Tensor, read_header

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"  # of ours: `kernel` [D, 1] and `bias` [1]
SUMS = "SHA256SUMS"
READ = (".json", ".jinja", ".safetensors")  # endings of the files whose digests are verified: all that is ever read
SAMPLES, BLOCK = 256, 4096  # of a weight file's fingerprint: blocks, bytes
PICKLED = (".bin", ".pt", ".pth")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_SUM = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?:\./)?(?P<name>.+)")


@dataclasses.dataclass(frozen=True)
class Directory:
    """What a directory holds; no tensor has been read."""

    path: Path
    key: str  # the config key or flag that named it, for messages
    config: Mapping[str, Any]  # config.json
    generation: Mapping[str, Any] | None  # generation_config.json
    tensors: Mapping[str, Tensor]
    value_head: Mapping[str, Tensor] | None

    def __str__(self) -> str:
        return f"{self.key} = {str(self.path)!r}"


def is_directory(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder that looks like a Hugging Face model, weights of any kind included, rather than a run of ours."""
    folder = Path(path)
    return folder.is_dir() and any(
        entry.name in (CONFIG, INDEX) or entry.name.endswith((".safetensors", *PICKLED)) for entry in folder.iterdir() if not entry.is_dir()
    )


def open_directory(path: str | os.PathLike[str], key: str) -> Directory:
    """Opens a model directory and verifies all but the tensors' values; with a SHA256SUMS, these too.

    Args:
      path: a local folder.
      key: the config key or flag that named it.

    Raises:
      UserError: a file is missing, damaged, quantised, pickled or outside the directory; or index and shards contradict each other.
    """
    folder, subject = Path(path), f"{key} = {str(path)!r}"
    if not folder.is_dir():
        raise UserError(f"{subject} is not a local folder: name a downloaded Hugging Face model (`hf download NAME --local-dir FOLDER`)")
    sums = read_sums(folder / SUMS)
    _verify(folder, {name: digest for name, digest in sums.items() if not name.endswith(".safetensors")}, subject)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{subject} holds no {CONFIG}: download the whole model, or save it with transformers' `save_pretrained`")
    config = read_json(folder / CONFIG)
    if config.get("quantization_config"):
        raise UserError(
            f"{subject}: {CONFIG} has a quantization_config, and only unquantised weights are read; download the original model, or load it in "
            "transformers and save `model.dequantize()`"
        )
    index = _weights(folder, subject)
    _verify(folder, {name: digest for name, digest in sums.items() if name.endswith(".safetensors")}, subject)
    tensors = read_header(_inside(folder, WEIGHTS, subject)) if index is None else _sharded(folder, index, subject)
    return Directory(
        folder,
        key,
        config,
        read_json(folder / GENERATION) if (folder / GENERATION).is_file() else None,
        tensors,
        read_header(_inside(folder, VALUE_HEAD, subject)) if (folder / VALUE_HEAD).is_file() else None,
    )


def fingerprint(source: Directory) -> str:
    """A digest that tells two models apart without reading them whole: config.json, and of each weight file its size and blocks all over it.

    Args:
      source: the opened directory.
    """
    sha = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    for path in sorted({tensor.file for tensor in source.tensors.values()}):
        size = path.stat().st_size
        sha.update(str(size).encode())
        with path.open("rb") as file:
            for start in range(0, size, max(size // SAMPLES, BLOCK)):
                file.seek(start)
                sha.update(file.read(BLOCK))
    return sha.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
      UserError: it does not.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); download or export it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__} and not a JSON object; download or export it again")
    return values


def _weights(folder: Path, subject: str) -> dict[str, str] | None:
    """The index's weight_map; None where one file holds all."""
    names = sorted(entry.name for entry in folder.iterdir())
    if WEIGHTS in names and INDEX in names:
        raise UserError(f"{subject} holds both {WEIGHTS} and {INDEX}, which may be two different models: remove the one that is not meant")
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if WEIGHTS in names:
        index = None
    elif INDEX in names:
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
            raise UserError(f"{folder / INDEX} has no weight_map from tensors to files; download it again")
    else:
        raise UserError(f"{subject} {_nothing_to_read(names, shards)}")
    if strangers := sorted(set(shards) - set((index or {}).values())):
        raise UserError(f"{subject} holds shards that no index names, {', '.join(strangers)}: remove them, or restore the {INDEX} that names them")
    return index


def _nothing_to_read(names: list[str], shards: list[str]) -> str:
    """Why a directory has no weights that can be read, and the remedy."""
    if shards:
        return f"holds {', '.join(shards)} and no {INDEX}, which says what is in them: download the index too"
    if pickled := [name for name in names if name.endswith((*PICKLED, ".bin.index.json"))]:
        return (
            f"holds pickled weights only ({', '.join(pickled)}), which are not read because a pickle can run any code; where you trust them, convert "
            "them: `AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)` of transformers"
        )
    if "adapter_config.json" in names:
        return "holds a PEFT adapter and no model: name the base model's folder here"
    others = [name for name in names if name.endswith((".safetensors", ".gguf", ".h5", ".msgpack"))]
    found = f" (only {', '.join(others)})" if others else ""
    return f"holds no {WEIGHTS} and no {INDEX}{found}: download the whole model, or save it with transformers' `save_pretrained`"


def _inside(folder: Path, name: str, subject: str) -> Path:
    """The path of a weight file, which does not leave the directory."""
    if not name or name != os.path.basename(name) or "\\" in name or "\0" in name or name in (".", ".."):
        raise UserError(f"{subject}: {INDEX} names the shard {name!r}, and a shard is a plain file name of the directory; download the model again")
    if not name.endswith(".safetensors"):
        raise UserError(f"{subject}: {INDEX} names the shard {name!r}, and only .safetensors files are read; save the model again with transformers")
    try:
        target, home = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself; which of the two depends on Python
        raise UserError(f"{subject}: {name} is a link that cannot be followed ({error}); put the file there") from error
    blobs = {home.parent.parent / "blobs"} if home.parent.name == "snapshots" else set()
    blobs |= {target.parent} if target.parent.name == "blobs" and target.parent.parent.name.startswith("models--") else set()
    if target.parent not in blobs and not target.is_relative_to(home):
        raise UserError(
            f"{subject}: {name} is a link to {str(target)!r}, outside the directory and the hub's cache; put the file there, or name its folder"
        )
    return target


def _sharded(folder: Path, index: Mapping[str, str], subject: str) -> dict[str, Tensor]:
    """The tensors of all shards, each in the shard that the index names and in no other."""
    paths = {name: _inside(folder, name, subject) for name in sorted(set(index.values()))}
    if missing := [name for name, path in paths.items() if not path.is_file()]:
        raise UserError(f"{subject} lacks {len(missing)} of the {len(paths)} shards that {INDEX} names, {', '.join(missing)}: download them")
    tensors: dict[str, Tensor] = {}
    problems = []
    for shard, path in paths.items():
        found = read_header(path)
        problems += [f"{name} is not in {shard}" for name, home in index.items() if home == shard and name not in found]
        for name, tensor in found.items():
            if index.get(name) != shard:
                problems.append(f"{name} is in {shard}, where the index {f'names {index[name]}' if name in index else 'does not name it'}")
            else:
                tensors[name] = tensor
    if problems:
        raise UserError(f"{subject}: {INDEX} contradicts the shards: {'; '.join(problems)}; download the model again, or save it again")
    return {name: tensors[name] for name in index}


# --- digests ---


def read_sums(path: Path) -> dict[str, str]:
    """sha256sum's file: the digest of each file of the directory itself; {} where there is none."""
    if not path.is_file():
        return {}
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        entry = _SUM.fullmatch(line)
        if line.strip() and entry is None:
            raise UserError(f"{path}:{number} is not a line of sha256sum, {line[:80]!r}: make the file again with `sha256sum *`, or remove it")
        if entry is not None and os.path.basename(entry["name"]) == entry["name"]:  # files of sub-folders are never read
            sums[entry["name"]] = entry["digest"].lower()
    return sums


def _verify(folder: Path, sums: Mapping[str, str], subject: str) -> None:
    """Compares the files that are read with their digests."""
    listed = {name: digest for name, digest in sums.items() if name.endswith(READ)}
    problems = [f"{name} is missing" for name in listed if not (folder / name).is_file()]
    there = [name for name in listed if (folder / name).is_file()]
    problems += [f"{name} is damaged" for name, digest in zip(there, _digests(folder / name for name in there)) if digest != listed[name]]
    if problems:
        remedy = f"download or export it again (or remove {SUMS}, if the change is yours)"
        raise UserError(f"{subject} differs from its {SUMS}: {', '.join(problems)}; {remedy}")


def _digests(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of each file, several at once: hashlib releases the interpreter's lock."""

    def one(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, paths))
