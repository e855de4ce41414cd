"""What a config names by a dotted path, and whether a parameter's value is of the kind that it has: the same for rewards and environments."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

from rlhf_jax.errors import UserError, nearest


def imported(path: Any, key: str, kind: str, example: str) -> Any:
    """The attribute behind `package.module.name` (or `package.module:name`).

    Args:
      path: dotted; its module must be importable.
      key: the config key that messages name.
      kind: what it should be, for messages: "function".
      example: a legal path, for messages.

    Raises:
      UserError: no such module or attribute, or an error on import.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".") if isinstance(path, str) else ("", "", "")
    if not module_name or not name:
        raise UserError(f"{key} expected a dotted path to a {kind}, such as {example!r}, got {path!r}; write module.{kind}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        missing = getattr(error, "name", None) or ""
        if isinstance(error, ModuleNotFoundError) and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise UserError(f"{key} expected an importable module, got {path!r} (no module {missing!r}); check PYTHONPATH") from None
        raise UserError(f"{key} got {path!r}, whose module does not import ({error}); correct it") from error
    except Exception as error:
        raise UserError(f"{key} got {path!r}, whose module raises {type(error).__name__}: {error}; correct it") from error
    if not hasattr(module, name):
        callables = [member for member, value in vars(module).items() if callable(value) and not member.startswith("_")]
        raise UserError(f"{key} expected a {kind} of {module_name}, got {name!r}{nearest(name, callables)}")
    return getattr(module, name)


def same_type(key: str, value: Any, default: Any) -> None:
    """Refuses a parameter's value that is not of its default's type; an int where a float is meant and a list where a tuple is are let through.

    Args:
      key: of the parameter, for messages.
      value: the config's.
      default: of the signature; none, or None, says nothing of the type.

    Raises:
      UserError: another type, or NaN.
    """
    if default is inspect.Parameter.empty or default is None:
        return
    kinds: tuple[type, ...] = {float: (float, int), tuple: (tuple, list)}.get(type(default), (type(default),))
    fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
    if not fits or (isinstance(value, float) and math.isnan(value)):
        raise UserError(f"{key} = {value!r}: must be a {type(default).__name__}, like {default!r}")
