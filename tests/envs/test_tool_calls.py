"""Tool calls: what is one, what is none and why; any text at all is parsed without an exception."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.envs.tool_calls import CLOSE, LONGEST, OPEN, Malformed, ToolCall, parse, write

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "1+2"}}</tool_call>'
ONE = ToolCall("calculator", {"expression": "1+2"})


def test_calls_in_a_text() -> None:
    assert parse("no call") == []
    assert parse(f"Let me see. {CALL} and {CALL}.") == [ONE, ONE]
    assert parse('<tool_call>\n{"name": "time"}\n</tool_call>') == [ToolCall("time", {})]


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        (CALL.removesuffix(CLOSE), ["not closed"]),
        (f"{OPEN}{CALL}", ["not closed", None]),
        (f"{CALL}{CLOSE}", [None, "closes nothing"]),
        (f"{OPEN}calculator(1+2){CLOSE}", ["JSON"]),
        (f"{OPEN}{CLOSE}", ["JSON"]),
        (f"{OPEN}[1]{CLOSE}", ["object"]),
        (f'{OPEN}{{"name": 3}}{CLOSE}', ["name"]),
        (f'{OPEN}{{"arguments": {{}}}}{CLOSE}', ["name"]),
        (f'{OPEN}{{"name": "a", "arguments": "1+2"}}{CLOSE}', ["arguments"]),
        (f'{OPEN}{{"name": "a", "arguments": {{"x": NaN}}}}{CLOSE}', ["JSON"]),
        (f"{OPEN}{'[' * 5000}{CLOSE}", ["JSON"]),
        (f'{OPEN}{{"name": "a", "arguments": {{"x": {"9" * 5000}}}}}{CLOSE}', ["JSON"]),
        (f"{OPEN}{' ' * (LONGEST + 1)}{CLOSE}", ["characters"]),
    ],
)
def test_malformed_calls(text: str, reasons: list[str | None]) -> None:
    found = parse(text)
    assert len(found) == len(reasons)
    for call, reason in zip(found, reasons):
        assert call == ONE if reason is None else isinstance(call, Malformed) and reason in call.reason


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6,
)
PIECES = st.lists(st.sampled_from([OPEN, CLOSE, "<tool_call", '{"name": "a"}', '{"name": "a", "arguments": {}}', "{", "x"]) | st.text(max_size=5))


@settings(max_examples=200, deadline=None)
@given(PIECES.map("".join))
def test_any_text_is_parsed(text: str) -> None:
    calls = parse(text)
    assert len(calls) <= text.count(OPEN) + text.count(CLOSE)
    assert bool(calls) == (OPEN in text or CLOSE in text)


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1), st.dictionaries(st.text(), VALUES, max_size=3), st.text().filter(lambda text: "tool_call>" not in text))
def test_what_is_written_is_read_back(name: str, arguments: dict[str, object], around: str) -> None:
    written = write(name, arguments)
    if "tool_call>" in json.dumps([name, arguments], ensure_ascii=False):  # marks inside a text are marks
        return
    assert parse(f"{around}{written}{around}") == [ToolCall(name, arguments)]
