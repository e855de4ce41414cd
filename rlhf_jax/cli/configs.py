"""`--config FILE[:VARIANT]` and `--config.KEY=VALUE`, with errors that name the key and the nearest legal one."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from rlhf_jax.errors import UserError, nearest


def define_config() -> None:
    """Defines --config."""
    config_flags.DEFINE_config_file("config", None, "a Python file with get_config()", lock_config=True)


def loaded_config() -> ConfigDict:
    """The parsed config; a missing one is a user's error."""
    if flags.FLAGS.config is None:
        raise UserError("--config is missing: name a config file, e.g. --config configs/sft.py:tiny")
    return flags.FLAGS.config


def check_overrides(arguments: list[str]) -> None:
    """Refuses a config file that does not load and `--config.KEY=VALUE` with a wrong key or type, before absl parses them.

    Args:
      arguments: the command line after the command's name.

    Raises:
      UserError: naming the file, or the key, the value and the remedy.
    """
    path = _config_argument(arguments)
    if path is None:
        return
    config = load_config(path)
    for argument in arguments:
        if not argument.startswith("-"):
            continue
        name, given, value = argument.lstrip("-").partition("=")
        name = name.removeprefix("no") if name.startswith("noconfig.") else name
        if name.startswith("config."):
            _check_one(config, name, value if given else None)


def load_config(path: str) -> ConfigDict:
    """get_config(VARIANT) of `FILE[:VARIANT]`.

    Raises:
      UserError: no such file, no get_config in it, or no such variant.
    """
    name, _, variant = path.partition(":")
    if not pathlib.Path(name).is_file():
        raise UserError(f"--config {name}: no such file")
    spec = importlib.util.spec_from_file_location("rlhf_jax_config", name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--config {name}: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = before
    if not hasattr(module, "get_config"):
        raise UserError(f"--config {name}: the file has no get_config(variant)")
    try:
        config = module.get_config(variant)
    except Exception as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"--config {path}: {said}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config {path}: get_config(variant) must return a ConfigDict, got {type(config).__name__}")
    return config


def like(file: str, base: str, variant: str) -> ConfigDict:
    """get_config(variant) of a neighbouring config file, as the start of one that differs in little.

    Args:
      file: `__file__` of the config that asks, in whose folder the other lies.
      base: the other's name without `.py`.
      variant: passed on.

    Raises:
      ValueError: the base has no such variant; it names the file that was asked for.
    """
    path = pathlib.Path(file)
    try:
        return load_config(f"{path.with_name(base + '.py')}:{variant}")
    except UserError as error:
        raise ValueError(f"{path.name}:{variant}: {str(error).rpartition(': ')[2]}") from error


def _config_argument(arguments: list[str]) -> str | None:
    for position, argument in enumerate(arguments):
        if argument in ("--config", "-config"):
            return arguments[position + 1] if position + 1 < len(arguments) else None
        if argument.startswith("--config="):
            return argument.partition("=")[2]
    return None


def _check_one(config: ConfigDict, name: str, value: str | None) -> None:
    node: Any = config
    parts = name.split(".")[1:]
    for depth, part in enumerate(parts):
        where = ".".join(["config", *parts[:depth]])
        if not isinstance(node, ConfigDict):
            raise UserError(f"{where} is a value, not a section: {name} does not exist")
        if part not in node:
            raise UserError(f"{where}.{part} is not a config key{nearest(part, node.keys())}")
        node = node[part]
    if isinstance(node, ConfigDict):
        raise UserError(f"{name} is a section: set one of its keys, {', '.join(sorted(node.keys()))}")
    if value is None:
        if not isinstance(node, bool):
            raise UserError(f"{name} needs a value: --{name}=VALUE")
        return
    try:
        if isinstance(node, bool):
            if value.lower() not in ("true", "false", "1", "0", "t", "f", "yes", "no", "y", "n"):
                raise ValueError
        elif isinstance(node, int | float):
            type(node)(value)
    except ValueError:
        kind = type(node).__name__
        raise UserError(f"{name} = {value!r}: must be {'an' if kind == 'int' else 'a'} {kind}, like {node!r}") from None
