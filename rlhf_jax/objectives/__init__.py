"""Objectives by name: one module per objective, found by `load`, bound to its hyper-parameters by `bind`.

An objective is a module with up to four pure functions, of which only `loss` is required:

    init_carry(nets, *, …) -> carry                                    its own checkpointed state
    prepare(nets, batch, carry, key, *, …) -> (batch, carry, metrics)  forward only, over the global batch
    loss(nets, batch, keys, *, …) -> (terms, metrics)                  dict[str, Mean] each; keys [B] for dropout
    opponent(nets, *, …) -> sampler                                    what draws every second sample of a prompt, if not the policy

Their keyword-only arguments are the legal keys of `config.objective`, without defaults, so that `prepare` and `loss` cannot disagree. The
annotation of `batch` says what the data pipeline builds. Four constants are optional in a module of the user's own: `RANGES`, {key: (low, high)} for
a number, both bounds included, or {key: names} for a string, a tuple or the table of what the names stand for: other values are refused at start-up.
`NEEDS`, {"reference" | "teacher" | "critic" | "reward" | "group" | "pairs" | "ptx": key}: what the run must have, always ("") or unless that
hyper-parameter is 0; refused at start-up too ("teacher": a reference to learn from; "pairs": an even number of samples of a prompt, of which
`prepare` makes pairs, B/2 rows). `DEFAULTS`, {key: value}: the paper's or its authors' values where they are stated, which configs/NAME.py writes
out. `DATA`, data kinds: what it trains on where the type of its batch does not tell, e.g. ("ranking",) for `Comparisons` of more than two responses.
There is no registry: a file in this folder is an objective, and so is a module of the user's own, named by its dotted path. Modules that start with
an underscore hold what objectives share; `_catalogue` reads the docstrings for README.md.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_jax.errors import UserError, nearest

POSITIONAL = {"init_carry": ("nets",), "prepare": ("nets", "batch", "carry", "key"), "loss": ("nets", "batch", "keys"), "opponent": ("nets",)}
NEEDS = ("reference", "teacher", "critic", "reward", "group", "pairs", "ptx")  # what NEEDS of a module may name


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective with its hyper-parameters bound; static, hashable by identity of its functions."""

    name: str
    batch_type: type  # Sequences, Comparisons, Unpaired, Rollout … : what the data pipeline builds
    init_carry: Callable[..., Any]  # (nets) -> carry
    prepare: Callable[..., Any]  # (nets, batch, carry, key) -> (batch, carry, metrics)
    loss: Callable[..., Any]  # (nets, batch, keys) -> (terms, metrics)
    hyperparameters: Mapping[str, Any] = dataclasses.field(compare=False)
    opponent: Callable[..., Any] | None = None  # (nets) -> what draws the odd samples of each prompt; None: the policy draws all
    needs: frozenset[str] = frozenset()  # of NEEDS, with these hyper-parameters
    data: tuple[str, ...] = ()  # data kinds; (): those of the batch type


def names() -> list[str]:
    """The built-in objectives, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> ModuleType:
    """The module of an objective.

    Args:
      name: one of `names()`, or the dotted path of a module on `sys.path` or below the current directory.

    Raises:
      UserError: there is no such module, or it has no `loss`.
    """
    if "." in name:
        module = _import_path(name)
    elif name in names():
        module = importlib.import_module(f"{__name__}.{name}")
    else:
        raise UserError(f"config.objective.name is {name!r}, which is no objective{nearest(name, names())}; "
                        "a module of your own is named by its dotted path")
    if not callable(getattr(module, "loss", None)):
        raise UserError(f"config.objective.name is {name!r}, a module without a function `loss(nets, batch, keys, *, …)`")
    return module


def bind(config_objective: Mapping[str, Any]) -> Objective:
    """The objective that `config.objective` names, its hyper-parameters bound.

    Args:
      config_objective: `name` and every hyper-parameter, e.g. `{"name": "dpo", "beta": 0.1}`.

    Raises:
      UserError: unknown name, unknown or missing key, a value of the wrong type, or a module that breaks the protocol.
    """
    given = dict(config_objective)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"config.objective.name is {name!r}: it must be the name of an objective ({', '.join(names())})")
    module = load(name)
    functions = {kind: getattr(module, kind) for kind in POSITIONAL if hasattr(module, kind)}
    keywords = {kind: _keywords(name, kind, function) for kind, function in functions.items()}
    legal = {key for keys in keywords.values() for key in keys}
    for key in given:
        if key not in legal:
            raise UserError(f"config.objective.{key} is not a hyper-parameter of {name}{nearest(key, legal)}")
    if missing := sorted(legal - given.keys()):
        raise UserError(f"config.objective lacks {', '.join(missing)}: {name} needs every hyper-parameter written out")
    annotations = _annotations(module)
    values = {key: _checked(key, value, annotations.get(key)) for key, value in given.items()}
    for key, legal_values in getattr(module, "RANGES", {}).items():
        _check_range(name, key, values[key], legal_values)

    def bound(kind: str, otherwise: Any) -> Any:
        if kind not in functions:
            return otherwise
        return functools.partial(functions[kind], **{key: values[key] for key in keywords[kind]})

    return Objective(
        name=name, batch_type=_batch_type(name, functions), hyperparameters=types.MappingProxyType(values),
        init_carry=bound("init_carry", lambda nets: {}),
        prepare=bound("prepare", lambda nets, batch, carry, key: (batch, carry, {})),
        loss=bound("loss", functions["loss"]), opponent=bound("opponent", None), needs=_needs(module, name, values),
        data=tuple(getattr(module, "DATA", ())),
    )


def _check_range(name: str, key: str, value: Any, legal: Any) -> None:
    """Refuses a number outside (low, high), both included, or a string that is not among the names in `legal`."""
    if all(isinstance(one, str) for one in legal):
        if value not in tuple(legal):
            raise UserError(f"config.objective.{key} is {value!r}, which is none of its values{nearest(str(value), legal)}")
    elif not legal[0] <= value <= legal[1]:
        raise UserError(f"config.objective.{key} = {value!r}: {name} needs it in [{legal[0]:g}, {legal[1]:g}]")


def _needs(module: ModuleType, name: str, values: Mapping[str, Any]) -> frozenset[str]:
    """What the run must have besides data: a need tied to a hyper-parameter goes away where that is 0."""
    declared = getattr(module, "NEEDS", None)
    if declared is None:  # a module of the user's own that does not say: what trains on rollouts is taken to read their scores
        return frozenset({"reward"})
    for need, key in declared.items():
        if need not in NEEDS or (key and key not in values):
            raise UserError(f"objective {name}: NEEDS has {need!r}: {key!r}; it maps any of {', '.join(NEEDS)} to '' or to a hyper-parameter")
    return frozenset(need for need, key in declared.items() if not key or values[key])


def _import_path(path: str) -> ModuleType:
    """Imports a user's module; only an error of finding it is the config's fault, one inside it keeps its traceback."""
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path  # the `rlhf-jax` script's own folder is on the path, not the user's
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise
        raise UserError(f"config.objective.name is {path!r}, but there is no module {error.name!r} on the Python path "
                        f"or below {here}") from error
    finally:
        if added:
            sys.path.remove(here)


def _keywords(name: str, kind: str, function: Callable[..., Any]) -> tuple[str, ...]:
    """The keyword-only arguments of one protocol function, after checking the rest of its signature."""
    parameters = inspect.signature(function).parameters.values()
    positional = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    if positional != POSITIONAL[kind] or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise UserError(f"objective {name}: {kind} takes ({', '.join(positional)}, …), but it must take "
                        f"({', '.join(POSITIONAL[kind])}, *, hyper-parameters)")
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    for parameter in keywords:
        if parameter.default is not parameter.empty:
            raise UserError(f"objective {name}: {kind} gives {parameter.name} a default; write the value in the config instead")
    return tuple(p.name for p in keywords)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's annotations, strings resolved where they can be."""
    try:
        return typing.get_type_hints(function)
    except NameError:  # a name that only a type checker sees
        scope = {**vars(builtins), **vars(sys.modules[function.__module__])}
        raw = getattr(function, "__annotations__", {})
        return {key: scope.get(hint) if isinstance(hint, str) else hint for key, hint in raw.items()}


def _annotations(module: ModuleType) -> dict[str, Any]:
    """The types of the hyper-parameters: from the protocol's functions, else from the module's maths that takes the same name."""
    functions = [f for name, f in vars(module).items() if inspect.isfunction(f) and (f.__module__ == module.__name__ or name in POSITIONAL)]
    hints: dict[str, Any] = {}
    for function in sorted(functions, key=lambda f: f.__name__ in POSITIONAL):  # the protocol's come last and win
        keywords = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        hints |= {key: hint for key, hint in _hints(function).items() if key in keywords}
    return hints


def _checked(key: str, value: Any, hint: Any) -> Any:
    """`value` if it is of the annotated type, an int made a float where a float is due."""
    if hint is None or hint is Any:
        return value
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(member) or member for member in members)
    if float in plain and isinstance(value, int) and not isinstance(value, bool) and int not in plain:
        value = float(value)
    fits = isinstance(value, plain) and not (isinstance(value, bool) and bool not in plain)
    if not fits or (isinstance(value, float) and math.isnan(value)):
        kinds = " or ".join("None" if kind is type(None) else kind.__name__ for kind in plain)
        raise UserError(f"config.objective.{key} is {value!r}: it must be a {kinds}")
    return value


def _batch_type(name: str, functions: Mapping[str, Callable[..., Any]]) -> type:
    """What the data pipeline builds: the `batch` of `prepare` where it is annotated, since it sees the batch first, else of `loss`."""
    for kind in ("prepare", "loss"):
        hint = _hints(functions[kind]).get("batch") if kind in functions else None
        if isinstance(hint, type):
            return hint
    raise UserError(f"objective {name}: annotate `batch` in loss with the type of batch it takes (Sequences, Comparisons, Rollout …)")
