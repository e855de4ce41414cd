"""`config.env`: which environment a name stands for, its parameters checked before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.dotted import imported, same_type
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
    make = NAMES.get(name) or _own(name, f"{key}.name")
    _check_parameters(make, parameters, f"{key}.parameters")
    try:
        made = make(**parameters)
    except Exception as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{key}.parameters.{said}") from error
    if missing := [member for member in MEMBERS if not hasattr(made, member)]:
        raise UserError(f"{key}.name = {name!r} makes a {type(made).__name__} without {', '.join(missing)}: see rlhf_jax/envs/README.md")
    return made


def _own(name: str, key: str) -> Callable[..., Any]:
    if "." not in name.replace(":", "."):
        raise UserError(f"{key} = {name!r} is no environment{nearest(name, NAMES)}; or name your own as module.Class")
    found = imported(name, key, "class or function", "my_envs.Countdown")
    if not callable(found):
        raise UserError(f"{key} = {name!r} is no class or function: name what makes an environment")
    return found  # type: ignore[no-any-return]


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
        same_type(f"{key}.{name}", value, known[name].default)
    if lacks := [name for name, parameter in known.items() if parameter.default is parameter.empty
                 and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in parameters]:
        raise UserError(f"{key} lacks {', '.join(lacks)}: this environment needs it")
