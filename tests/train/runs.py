"""Runs of the shipped `:tiny` configs with a model smaller still: what the run-level tests start, kill, resume and compare."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import load_config

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
CACHE = ROOT / ".cache" / "data-tests"  # prepared data, reused by later sessions
SMALL = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 32}


def tiny(name: str, changes: Mapping[str, Any] | None = None) -> ConfigDict:
    """configs/NAME.py:tiny on a one-layer model, with `changes` by dotted key."""
    config = load_config(f"{CONFIGS / name}.py:tiny")
    config.model.update(SMALL)
    config.data.cache = str(CACHE)
    config.update_from_flattened_dict(dict(changes or {}))
    return config


def arguments(name: str, changes: Mapping[str, Any], workdir: pathlib.Path) -> list[str]:
    """The command line after `rlhf-jax train` that means `train(tiny(name, changes), workdir)`."""
    values = {**{f"model.{key}": value for key, value in SMALL.items()}, "data.cache": str(CACHE), **changes}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={CONFIGS / name}.py:tiny", f"--workdir={workdir}", *flags]


def metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return rows(folder / "metrics.jsonl")


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def series(folder: pathlib.Path, name: str) -> list[float]:
    """One metric's values in the order of writing."""
    return [float(line[name]) for line in metrics(folder) if name in line]


def outcome(folder: pathlib.Path) -> dict[str, bytes]:
    """What a run leaves for its reader, byte for byte: the end state's hash and best step, metrics, samples."""
    found = {name: folder / name for name in ("final.json", "metrics.jsonl", "samples.jsonl")}
    return {name: path.read_bytes() for name, path in found.items() if path.exists()}


def steps(folder: pathlib.Path) -> list[int]:
    """Checkpoints that stand in a folder of steps."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def snapshot(folder: pathlib.Path) -> dict[str, bytes] | None:
    """Every file below `folder` with its content, None where there is nothing."""
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_rows(path: pathlib.Path, content: list[Any]) -> str:
    """A .jsonl file; a str or bytes stands as it is. Returns its path."""
    lines = [row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode() for row in content]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)
