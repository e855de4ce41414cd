"""What a row of a data file says, before any template or tokenizer: one frozen dataclass per kind.

A reader makes them, an encoder consumes them. `source` and `line` name the row in every message about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

ROLES = ("system", "user", "assistant", "tool")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # one of ROLES
    content: str
    name: NotRequired[str]  # of the tool that answers
    tool_call_id: NotRequired[str]  # the call that a tool answers
    tool_calls: NotRequired[list[dict[str, Any]]]  # an assistant's calls, as chat templates read them
    reasoning_content: NotRequired[str]  # an assistant's thoughts, apart from its answer


Messages = tuple[Message, ...]
Tools = tuple[dict[str, Any], ...]  # JSON schemas of the functions that an assistant may call


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A conversation to imitate; assistant turns from message `context` on are trained on."""

    messages: Messages
    context: int = 0  # the first messages that are a given prompt: never trained on, whoever speaks
    tools: Tools = ()
    source: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two responses to one prompt, the better one first."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None  # how much better, in the file's own unit
    tools: Tools = ()
    source: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """One response to a prompt, said to be good or bad."""

    prompt: Messages
    response: Messages
    desirable: bool
    tools: Tools = ()
    source: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Responses to one prompt, best first, at least two."""

    prompt: Messages
    responses: tuple[Messages, ...]
    tools: Tools = ()
    source: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One response to a prompt and its score, in the file's own unit."""

    prompt: Messages
    response: Messages
    score: float
    tools: Tools = ()
    source: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Stepwise:
    """An answer in steps, each said to be right or wrong."""

    prompt: Messages
    steps: tuple[str, ...]  # at least one, none blank
    labels: tuple[bool, ...]  # one per step
    tools: Tools = ()
    source: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a policy answers, with what a verifier may need to judge the answer."""

    messages: Messages
    reference: dict[str, Any] | None = None
    tools: Tools = ()
    source: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Text:
    """A plain document."""

    text: str
    source: str
    line: int


Record = Demo | Preference | Feedback | Ranking | Rating | Stepwise | Prompt | Text
KINDS: dict[str, type] = {
    "demo": Demo, "text": Text, "preference": Preference, "ranking": Ranking, "feedback": Feedback, "rating": Rating, "stepwise": Stepwise,
    "prompt": Prompt,
}


def where(record: Record) -> str:
    """`file:line` of a record."""
    return f"{record.source}:{record.line}"
