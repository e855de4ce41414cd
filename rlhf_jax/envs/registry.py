"""`config.env`: which environment a name stands for, its parameters checked before anything is built."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.envs.calculator import Calculator
from rlhf_jax.envs.guess import Guess
from rlhf_jax.envs.protocol import Environment
from rlhf_jax.errors import UserError, nearest

NAMES: dict[str, Callable[..., Any]] = {"calculator": Calculator, "guess": Guess}
MEMBERS = ("role", "counters", "reset", "step")


def load(name: str, parameters: Mapping[str, Any], key: str = "config.env") -> Environment:
    """The environment behind a short name, or behind the dotted path of a class or function that makes one.

    Args:
      name: "calculator", or "my_module.MyEnvironment".
      parameters: its keyword arguments.
      key: the config section that messages name.

    Raises:
      UserError: no such environment, unknown or senseless parameters, or an object that lacks part of the protocol.
    """
    make = NAMES.get(name) or _imported(name, f"{key}.name")
    _check_parameters(make, parameters, f"{key}.parameters")
    try:
        made = make(**parameters)
    except Exception as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{key}.parameters.{said}") from error
    if missing := [member for member in MEMBERS if not hasattr(made, member)]:
        raise UserError(f"{key}.name = {name!r} makes a {type(made).__name__} without {', '.join(missing)}: see rlhf_jax/envs/README.md")
    return made


def _imported(dotted: str, key: str) -> Callable[..., Any]:
    module_name, _, name = dotted.replace(":", ".").rpartition(".")
    if not module_name or not name:
        raise UserError(f"{key} = {dotted!r} is no environment{nearest(dotted, NAMES)}; or name your own as module.Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key} = {dotted!r}: no module {error.name!r}; check PYTHONPATH") from None
    except Exception as error:
        raise UserError(f"{key} = {dotted!r}: its module raises {type(error).__name__}: {error}; correct it") from error
    if not callable(getattr(module, name, None)):
        callables = [member for member, value in vars(module).items() if callable(value) and not member.startswith("_")]
        raise UserError(f"{key} = {dotted!r}: {module_name} has no class or function {name!r}{nearest(name, callables)}")
    return getattr(module, name)


def _check_parameters(make: Callable[..., Any], parameters: Mapping[str, Any], key: str) -> None:
    """Names as the signature has them, values of their defaults' types, an int where a float is meant let through."""
    try:
        known = inspect.signature(make).parameters
    except ValueError:  # a builtin without a signature: only the call can tell
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for name, value in parameters.items():
        if name not in known:
            raise UserError(f"{key}.{name} is not a parameter of this environment{nearest(name, known)}")
        default = known[name].default
        if default is inspect.Parameter.empty or default is None:
            continue
        kinds: tuple[type, ...] = {float: (float, int), tuple: (tuple, list)}.get(type(default), (type(default),))
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise UserError(f"{key}.{name} = {value!r}: must be a {type(default).__name__}, like {default!r}")
    if lacks := [name for name, parameter in known.items() if parameter.default is parameter.empty
                 and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in parameters]:
        raise UserError(f"{key} lacks {', '.join(lacks)}: this environment needs it")
