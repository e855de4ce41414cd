"""Tool calls in a policy's text, in the form that Hermes and Qwen write: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

`parse` takes any text and raises nothing: what opens a call and is none becomes a `Malformed` with a sentence for the policy to read.
See: NousResearch, Hermes function calling. Deviation: a call that is cut off, longer than LONGEST or no strict JSON is told so instead of being
repaired.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

OPEN, CLOSE = "<tool_call>", "</tool_call>"
LONGEST = 8192  # characters of one call; a longer one is not read
_MARK = re.compile(f"{OPEN}|{CLOSE}")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that can be tried."""

    name: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Malformed:
    """What opens a call and is none, with the reason, a sentence without its end."""

    reason: str


def parse(text: str) -> list[ToolCall | Malformed]:
    """The calls of a text, in order; none where nothing opens one.

    Args:
      text: any.
    """
    found: list[ToolCall | Malformed] = []
    begin: int | None = None
    for mark in _MARK.finditer(text):
        if mark.group() == OPEN:
            if begin is not None:
                found.append(Malformed(f"a call was opened and not closed with {CLOSE}"))
            begin = mark.end()
        elif begin is None:
            found.append(Malformed(f"{CLOSE} closes nothing"))
        else:
            found.append(_read(text[begin : mark.start()]))
            begin = None
    if begin is not None:
        found.append(Malformed(f"a call was opened and not closed with {CLOSE}"))
    return found


def write(name: str, arguments: Mapping[str, Any]) -> str:
    """The text of a call, which `parse` reads back.

    Args:
      name: of the tool.
      arguments: JSON values.
    """
    return f"{OPEN}{json.dumps({'name': name, 'arguments': dict(arguments)}, ensure_ascii=False, separators=(',', ':'))}{CLOSE}"


def _read(body: str) -> ToolCall | Malformed:
    if len(body) > LONGEST:
        return Malformed(f"a call has at most {LONGEST} characters")
    try:
        value = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return Malformed("a call must be one JSON object")
    if not isinstance(value, dict):
        return Malformed("a call must be a JSON object")
    name, arguments = value.get("name"), value.get("arguments", {})
    if not isinstance(name, str) or not name:
        return Malformed('a call needs a "name", which is a text')
    if not isinstance(arguments, dict):
        return Malformed('the "arguments" of a call must be an object')
    return ToolCall(name, arguments)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)  # NaN and Infinity are Python's JSON, nobody else's
