"""`config.rewards`: what each entry names, how it enters the score, and its parameters, checked before anything is built.

An entry is a dict: `name`; of every reward `label`, `weight`, `clip`, `normalise`; of a function `each`; and the reward's own parameters. Names
with a meaning of their own are `rules.NAME`, `judge`, `learned` (a reward model) and `implicit` (a policy trained by preference optimisation, as a
reward); any other is the dotted path of a user's function, whose keyword-only arguments are its parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.dotted import same_type
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.rewards import judge, rules
from rlhf_jax.rewards.combine import Share
from rlhf_jax.rewards.host import RewardFn, load_reward_fn

COMMON: dict[str, str] = {
    "name": "what gives the reward",
    "label": "its name in the log, `reward/<label>`; else the name's last part",
    "weight": "of its value in the sum; 1",
    "clip": "(low, high), bounds of the value before normalisation and weight",
    "normalise": "none, batch (this batch's mean and deviation), stored (a reward model's own) or (mean, deviation)",
    "each": "a function is called once per row, so that a failure hits its row alone",
}
NETWORKS: dict[str, tuple[str, ...]] = {"learned": ("run",), "implicit": ("run", "reference", "beta")}  # and their parameters
NORMALISE = ("none", "batch", "stored")
# Metrics of other meanings.
TAKEN = ("failed", "chosen", "rejected", "margin", "accuracy", "step_accuracy", "error", "baseline", "mean", "std", "length_baseline")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checked entry of config.rewards."""

    key: str  # config.rewards[0]
    name: str
    share: Share
    stored: bool  # normalise by the moments in the reward model's checkpoint
    each: bool
    parameters: Mapping[str, Any]
    function: RewardFn | None  # with its parameters bound; None: a network


def short_name(dotted: str) -> Callable[..., Any] | None:
    """The package's own function behind a short name, None for any other name.

    Args:
      dotted: e.g. "rules.numeric".

    Raises:
      UserError: no such rule.
    """
    room, _, name = dotted.partition(".")
    if room != "rules":
        return None
    if name not in rules.NAMES:
        raise UserError(f"{dotted!r} is no rule{nearest(name, rules.NAMES)}")
    return getattr(rules, name)


def load_function(name: Any, key: str, parameters: Mapping[str, Any] | None = None) -> RewardFn:
    """A reward function by its short name or dotted path, its parameters bound and, of the package's own, tried on no rows.

    Args:
      name: "rules.numeric", or "my_module.my_function".
      key: the config key that messages name.
      parameters: keyword arguments.

    Raises:
      UserError: no such function, unknown or missing parameters, or senseless ones.
    """
    try:
        own = short_name(name) if isinstance(name, str) else None
    except UserError as error:
        raise UserError(f"{key} = {error}") from None
    if name == "judge":
        return _tried(judge.reward, key, parameters or {}, lambda bound: bound())
    if own is not None:
        return _tried(own, key, parameters or {}, lambda bound: bound([], [], []) or bound)
    return load_reward_fn(name, key, parameters or {})


def _tried(function: Callable[..., Any], key: str, parameters: Mapping[str, Any], attempt: Callable[[Any], Any]) -> Any:
    keywords = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name, value in parameters.items():
        if name not in keywords:
            raise UserError(f"{key}.{name} is not a parameter of this reward{nearest(name, {*keywords, *COMMON})}")
        same_type(f"{key}.{name}", value, keywords[name].default)
    if missing := [name for name, keyword in keywords.items() if keyword.default is keyword.empty and name not in parameters]:
        raise UserError(f"{key} lacks {', '.join(missing)}: this reward needs it")
    try:
        return attempt(functools.partial(function, **_frozen(parameters)))
    except ValueError as error:
        raise UserError(f"{key}.{error}") from error


def _frozen(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()}


def parse(rewards: Any, key: str = "config.rewards") -> tuple[Entry, ...]:
    """The entries of config.rewards.

    Args:
      rewards: a tuple of dicts.
      key: the config key that messages name.

    Raises:
      UserError: the first mistake.
    """
    if isinstance(rewards, str | Mapping) or not isinstance(rewards, Sequence):
        raise UserError(f"{key} = {rewards!r}: must be a tuple of dicts, e.g. ({{'name': 'rules.numeric', 'weight': 1.0}},)")
    entries = tuple(_entry(entry, f"{key}[{number}]") for number, entry in enumerate(rewards))
    seen: dict[str, str] = {}
    for entry in entries:
        if (label := entry.share.label) in seen:
            raise UserError(f"{entry.key} and {seen[label]} are both logged as reward/{label}: give one of them another 'label'")
        seen[label] = entry.key
    return entries


def _entry(given: Any, key: str) -> Entry:
    if not isinstance(given, Mapping):
        raise UserError(f"{key} = {given!r}: must be a dict with a 'name'")
    name = given.get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{key}.name = {name!r}: must be a rule such as 'rules.numeric', 'judge', 'learned', 'implicit' or a function's dotted path")
    parameters = {each: value for each, value in given.items() if each not in COMMON}
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"{key}.weight = {weight!r}: must be a finite number")
    if not isinstance(given.get("each", False), bool):
        raise UserError(f"{key}.each = {given['each']!r}: must be True or False")
    label = given.get("label", name.replace(":", ".").rpartition(".")[2])
    if not isinstance(label, str) or not label.isidentifier() or label in TAKEN:
        raise UserError(f"{key}.label = {label!r}: must be a plain name that is no other metric's ({', '.join(TAKEN)})")
    clip = _pair(given.get("clip"), f"{key}.clip", "(low, high) with low < high", lambda low, high: low < high)
    normalise = given.get("normalise", "none")
    named = isinstance(normalise, str)
    if named and normalise not in NORMALISE:
        raise UserError(f"{key}.normalise = {normalise!r}: must be one of {', '.join(NORMALISE)}, or (mean, deviation)")
    if normalise == "stored" and name != "learned":
        raise UserError(f"{key}.normalise = 'stored': only a learned reward stores its moments; {name} does not")
    moments = None if named else _pair(normalise, f"{key}.normalise", "none, batch, stored or (mean, deviation > 0)", lambda _, std: std > 0)
    if name in NETWORKS:
        _check_network(name, parameters, given, key)
        function = None
    else:
        function = load_function(name, key, parameters)
    share = Share(label, float(weight), clip, normalise == "batch", moments)
    return Entry(key, name, share, normalise == "stored", given.get("each", False), parameters, function)


def _check_network(name: str, parameters: Mapping[str, Any], given: Mapping[str, Any], key: str) -> None:
    for parameter in parameters:
        if parameter not in NETWORKS[name]:
            raise UserError(f"{key}.{parameter} is not a parameter of {name}{nearest(parameter, {*NETWORKS[name], *COMMON})}")
    if "each" in given:
        raise UserError(f"{key}.each: {name} is a network, not a function; take it out")
    for parameter in NETWORKS[name]:
        value = parameters.get(parameter)
        if parameter == "beta":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"{key}.beta = {value!r}: must be a number > 0, the one that the policy was trained with")
        elif not isinstance(value, str) or not value:
            raise UserError(f"{key}.{parameter} = {value!r}: must name a run, a checkpoint or a Hugging Face directory")


def _pair(value: Any, key: str, form: str, legal: Callable[[float, float], bool]) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
    if not numbers or any(math.isnan(x) for x in value) or not legal(*value):
        raise UserError(f"{key} = {value!r}: must be {form}")
    return float(value[0]), float(value[1])
