"""A question, a calculator that the policy may call, and an answer that is checked.

A turn with tool calls gets their results, or what is wrong with them, as text; a turn without any is the answer and ends the episode. It is right if
the number in `<answer>…</answer>`, else the last number of the text, equals the row's `answer` exactly: reward 1, else 0.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from rlhf_jax.data.records import Message
from rlhf_jax.envs import arithmetic, tool_calls
from rlhf_jax.envs.protocol import Step

NAME = "calculator"  # of the tool
CALLS = 8  # of one turn that are answered
SCHEMA: dict[str, Any] = {  # for the `tools` of a prompt file's row, which a template with tools writes into the prompt
    "type": "function",
    "function": {
        "name": NAME, "description": "Evaluates an arithmetic expression exactly.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
_TAGGED = re.compile(r"<answer>(.{0,256}?)</answer>", re.DOTALL)
# Whole runs of digits, however long, so that no number is read from the middle of another one: 2,992, 0.5, 1e-5, 1.5/2.
_NUMBER = re.compile(r"-?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?(?:/[0-9]+(?:\.[0-9]+)?)?")
_LARGE = re.compile(r"[eE][-+]?[0-9]{4}")


@dataclasses.dataclass(frozen=True)
class State:
    """Of one question."""

    answer: Fraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calculator:
    """`role`, of its replies: "tool" writes one message per call, "user" one for all with a `<tool_response>` each, for templates without tools."""

    role: str = "tool"

    def __post_init__(self) -> None:
        if self.role not in ("tool", "user"):
            raise ValueError(f"role = {self.role!r}: must be tool or user")

    @property
    def counters(self) -> tuple[str, ...]:
        """Calls that were tried, those of them without a result, and what opened a call and was none."""
        return ("tool_calls", "tool_errors", "malformed_calls")

    def reset(self, messages: Sequence[Message], reference: Mapping[str, Any] | None, seed: int) -> State:
        """The answer of the row; chance has no part here. Raises ValueError without one."""
        value = (reference or {}).get("answer")
        if not isinstance(value, int | float | str) or isinstance(value, bool):
            raise ValueError(f"the calculator needs rows with an answer, a number, and got {reference!r}")
        try:
            return State(Fraction(repr(value)) if isinstance(value, float) else arithmetic.evaluate(str(value)))
        except ValueError as error:  # of a NaN too
            raise ValueError(f"the calculator needs rows with an answer, a number, and got {value!r}: {error}") from None

    def step(self, state: State, response: str) -> Step:
        """The calls' results, or the verdict on the answer."""
        calls = tool_calls.parse(response)
        if not calls:
            given = final_number(response)
            return Step(state=state, reward=float(given == state.answer), done=True)
        counts = dict.fromkeys(self.counters, 0)
        texts = []
        for call in calls[:CALLS]:
            kind, text = self._answered(call)
            counts[kind] += 1
            counts["tool_calls"] += kind == "tool_errors"
            texts.append(text)
        if len(calls) > CALLS:
            counts["malformed_calls"] += len(calls) - CALLS
            texts.append(f"error: at most {CALLS} calls in one turn")
        return Step(state=state, replies=self._replies(texts), counts=counts)

    def _answered(self, call: tool_calls.ToolCall | tool_calls.Malformed) -> tuple[str, str]:
        """(the counter that it belongs to, the text of its result)."""
        if isinstance(call, tool_calls.Malformed):
            return "malformed_calls", f"error: {call.reason}"
        if call.name != NAME:
            return "malformed_calls", f"error: there is no tool {call.name[:32]!r}, only {NAME!r}"
        expression = call.arguments.get("expression")
        if set(call.arguments) != {"expression"} or not isinstance(expression, str):
            return "malformed_calls", f'error: {NAME} takes one argument, "expression", which is a text'
        try:
            return "tool_calls", arithmetic.show(arithmetic.evaluate(expression))
        except arithmetic.Refused as error:
            return "tool_errors", f"error: {error}"

    def _replies(self, texts: list[str]) -> tuple[Message, ...]:
        if self.role == "tool":
            return tuple(Message(role="tool", content=text, name=NAME) for text in texts)
        return (Message(role="user", content="\n".join(f"<tool_response>{text}</tool_response>" for text in texts)),)


def final_number(text: str) -> Fraction | None:
    """The number in the last `<answer>…</answer>`, else the last one of the text; None where there is none, or one beyond all sizes.

    Args:
      text: any.
    """
    tagged = _TAGGED.findall(text)
    found = _NUMBER.findall(tagged[-1] if tagged else text)
    if not found or len(found[-1]) > 2 * arithmetic.DIGITS or _LARGE.search(found[-1]):
        return None
    number, _, divisor = found[-1].replace(",", "").partition("/")
    try:
        return Fraction(number) / Fraction(divisor or 1)
    except ZeroDivisionError:
        return None
