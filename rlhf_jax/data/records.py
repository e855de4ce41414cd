"""What a row of a data file says, before any template or tokenizer: one frozen dataclass per kind.

A reader makes them, an encoder consumes them. `source` and `line` name the row in every message about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # one of ROLES
    content: str


Messages = tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A conversation to imitate; assistant turns from message `context` on are trained on."""

    messages: Messages
    context: int = 0  # the first messages that are a given prompt: never trained on, whoever speaks
    source: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two responses to one prompt, the better one first."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None  # how much better, in the file's own unit
    source: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a policy answers, with what a verifier may need to judge the answer."""

    messages: Messages
    reference: dict[str, Any] | None = None
    source: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Text:
    """A plain document."""

    text: str
    source: str
    line: int


Record = Demo | Preference | Prompt | Text
KINDS: dict[str, type] = {"demo": Demo, "preference": Preference, "prompt": Prompt, "text": Text}


def where(record: Record) -> str:
    """`file:line` of a record."""
    return f"{record.source}:{record.line}"
