"""Local JSONL to records, streamed; the field's formats are recognised row by row from the fields present.

demo: `messages` | `prompt` + `completion` | `instruction` (+ `input`) + `output` (Alpaca) | `prompt` + `response`.
preference: `prompt` + `chosen` + `rejected`, or `chosen` + `rejected` as whole conversations with a common beginning; `margin`.
prompt: `prompt` | `messages`, with `reference` (an object), else the row's other fields, kept for verifiers. text: `text`.
No row is dropped: a malformed one stops the reading with `file:line field expected …, got …; remedy`. Blank lines are no rows;
a byte-order mark and CRLF are accepted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax.data.records import KINDS, ROLES, Demo, Message, Messages, Preference, Prompt, Record, Text
from rlhf_jax.errors import UserError, nearest

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_BOM = b"\xef\xbb\xbf"


def data_files(path: Paths) -> list[str]:
    """The .jsonl files that `path` names, in the order of reading (a folder's by name).

    Args:
      path: a file, a folder of .jsonl files, or a list of either.

    Raises:
      UserError: nothing is there, a file is no .jsonl, a folder has none, or a file is named twice.
    """
    entries = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not entries:
        raise UserError("data path expected a .jsonl file, a folder or a list of them, got an empty list; name one in config.data")
    files: list[str] = []
    for entry in (os.fspath(entry) for entry in entries):
        if os.path.isdir(entry):
            found = sorted(os.path.join(entry, name) for name in os.listdir(entry) if name.endswith(".jsonl"))
            if not found:
                raise UserError(f"data path {entry} expected .jsonl files in the folder, got none; put data there or name another")
            files += found
        elif not os.path.isfile(entry):
            raise UserError(f"data path {entry or repr(entry)} expected a file or folder, got nothing there; check config.data")
        elif not entry.endswith(".jsonl"):
            raise UserError(f"data path {entry} expected a .jsonl file, got another ending; write one JSON object per line, named .jsonl")
        else:
            files.append(entry)
    seen: set[str] = set()
    for file in files:
        if os.path.realpath(file) in seen:
            raise UserError(f"data path {file} expected each file once, got it twice; remove one from the list")
        seen.add(os.path.realpath(file))
    return files


def read_records(kind: str, path: Paths) -> Iterator[Record]:
    """Every row of `path` as a record of `kind`, in file order.

    Args:
      kind: demo, preference, prompt or text.
      path: see `data_files`.

    Raises:
      UserError: a file is missing or empty, or a row is malformed (`file:line field expected …, got …; remedy`).
    """
    if kind not in KINDS:
        raise UserError(f"config.data.kind expected a kind of record, got {kind!r}{nearest(kind, KINDS)}")
    parsers: Mapping[str, Callable[[_Row], Record]] = {"demo": _demo, "preference": _preference, "prompt": _prompt, "text": _text}
    for file in data_files(path):
        empty = True
        for row in _rows(file):
            empty = False
            yield parsers[kind](row)
        if empty:
            raise UserError(f"{file}:1 row expected a JSON object, got an empty file; write one {kind} per line")


class _Row:
    """A JSON object with its place, and the one way to complain about it."""

    def __init__(self, fields: dict[str, Any], source: str, line: int) -> None:
        self.fields, self.source, self.line = fields, source, line

    def has(self, *names: str) -> bool:
        return all(self.fields.get(name) is not None for name in names)

    def bad(self, field: str, expected: str, got: Any, remedy: str) -> UserError:
        return UserError(f"{self.source}:{self.line} {field} expected {expected}, got {_show(got)}; {remedy}")

    def lacks(self, field: str, expected: str) -> UserError:
        return self.bad(field, expected, _Literal(f"fields {sorted(self.fields)}"), "add the missing field or set config.data.kind")

    def text(self, field: str, *, empty: bool = True) -> str:
        return self.checked(field, self.fields.get(field), empty=empty)

    def checked(self, field: str, value: Any, *, empty: bool = True) -> str:
        if not isinstance(value, str):
            raise self.bad(field, "a string", value, "write the text as a JSON string")
        if not empty and not value.strip():
            raise self.bad(field, "a non-empty string", value, "fill in or remove the row")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.bad(field, "valid Unicode", _Literal(ascii(error.object[error.start])), "remove the lone surrogate") from None
        return value

    def messages(self, field: str) -> Messages:
        value = self.fields.get(field)
        if not isinstance(value, list) or not value:
            raise self.bad(field, "a non-empty list of messages", value, 'write [{"role": "user", "content": "…"}, …]')
        return tuple(self._message(f"{field}[{i}]", item) for i, item in enumerate(value))

    def _message(self, field: str, item: Any) -> Message:
        if not isinstance(item, dict):
            raise self.bad(field, 'an object with "role" and "content"', item, "write each message as an object")
        role = item.get("role")
        if role not in ROLES:
            raise self.bad(f"{field}.role", f"one of {', '.join(ROLES)}", role, "rename the role")
        return Message(role=role, content=self.checked(f"{field}.content", item.get("content")))

    def turns(self, field: str, role: str) -> Messages:
        """A field that holds messages, or a string said by `role`."""
        if isinstance(self.fields.get(field), list):
            return self.messages(field)
        if not isinstance(self.fields.get(field), str):
            raise self.bad(field, "a string or a list of messages", self.fields.get(field), "write the text as a JSON string")
        return (Message(role=role, content=self.text(field)),)

    @property
    def place(self) -> dict[str, Any]:
        return {"source": self.source, "line": self.line}


class _Literal(str):
    """Text shown as it stands in a message."""


def _show(value: Any) -> str:
    if isinstance(value, _Literal):
        return str(value)
    if value is None:
        return "nothing"
    shown = ascii(value) if isinstance(value, str) else json.dumps(value, default=str)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _rows(file: str) -> Iterator[_Row]:
    with open(file, "rb") as stream:
        for line, raw in enumerate(stream, start=1):
            raw = raw.removeprefix(_BOM) if line == 1 else raw
            blank = _Row({}, file, line)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise blank.bad("row", "UTF-8", _Literal(f"byte 0x{raw[error.start]:02x}"), "save the file as UTF-8") from None
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
                got = _Literal(f"{_show(text.strip())} ({reason})")
                raise blank.bad("row", "valid JSON", got, "write one JSON object per line") from None
            if not isinstance(fields, dict):
                raise blank.bad("row", "a JSON object", fields, "write one JSON object per line")
            yield _Row(fields, file, line)


def _demo(row: _Row) -> Demo:
    prompt: Messages = ()
    if row.has("messages"):
        messages = row.messages("messages")
    elif row.has("prompt", "completion"):
        prompt, messages = _prompted(row, "completion")
    elif row.has("instruction", "output"):
        asked = row.text("instruction", empty=False)
        extra = row.text("input") if row.has("input") else ""
        prompt = (Message(role="user", content=f"{asked}\n\n{extra}" if extra.strip() else asked),)
        messages = prompt + (Message(role="assistant", content=row.text("output")),)
    elif row.has("prompt", "response"):
        prompt, messages = _prompted(row, "response")
    else:
        raise row.lacks("messages", "messages, prompt + completion, instruction + output, or prompt + response")
    if not any(message["role"] == "assistant" for message in messages[len(prompt) :]):
        field = "messages" if row.has("messages") else "completion"
        raise row.bad(field, "an assistant message to learn from", _Literal("none"), "add the answer or remove the row")
    return Demo(messages=messages, context=len(prompt), **row.place)


def _prompted(row: _Row, field: str) -> tuple[Messages, Messages]:
    prompt = row.turns("prompt", "user")
    return prompt, prompt + row.turns(field, "assistant")


def _preference(row: _Row) -> Preference:
    if not row.has("chosen", "rejected"):
        raise row.lacks("chosen", "prompt + chosen + rejected, or chosen + rejected as whole conversations")
    chosen, rejected = row.turns("chosen", "assistant"), row.turns("rejected", "assistant")
    prompt = row.turns("prompt", "user") if row.has("prompt") else _common_prompt(row, chosen, rejected)
    if prompt == chosen[: len(prompt)] and prompt == rejected[: len(prompt)]:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for field, branch in (("chosen", chosen), ("rejected", rejected)):
        if not branch or branch[-1]["role"] != "assistant":
            raise row.bad(field, "a response ending with an assistant message", list(branch), "add the response or remove the row")
        if branch[0]["role"] != "assistant":
            raise row.bad(field, "the same conversation as the prompt, then an answer", list(branch), "make the prompt a prefix of it")
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, margin=_margin(row), **row.place)


def _common_prompt(row: _Row, chosen: Messages, rejected: Messages) -> Messages:
    """The shared beginning of two conversations, leaving each at least its last message and starting with the assistant's turn."""
    if not (isinstance(row.fields["chosen"], list) and isinstance(row.fields["rejected"], list)):
        raise row.lacks("prompt", "a string or a list of messages, because chosen and rejected are strings")
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    if length == 0:
        raise row.bad("chosen", "a beginning in common with rejected", list(chosen[:1]), "start both with the prompt or add a prompt field")
    return chosen[:length]


def _margin(row: _Row) -> float | None:
    value = row.fields.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise row.bad("margin", "a finite number", value, "write how much better chosen is, or leave margin out")
    return float(value)


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(float(value)) and abs(float(value)) < 3e38  # float32 holds it
    except OverflowError:
        return False


def _prompt(row: _Row) -> Prompt:
    field = "prompt" if row.has("prompt") else "messages"
    if not row.has(field):
        raise row.lacks("prompt", "prompt (a string or a list of messages) or messages")
    messages = row.turns(field, "user") if field == "prompt" else row.messages(field)
    if messages[-1]["role"] == "assistant":
        raise row.bad(field, "a conversation that waits for an answer", list(messages[-1:]), "end it with a user message")
    reference = row.fields.get("reference")
    if reference is None:
        reference = {name: value for name, value in row.fields.items() if name not in (field, "reference")} or None
    elif not isinstance(reference, dict):
        raise row.bad("reference", "an object", reference, 'write what a verifier needs as {"answer": …}')
    return Prompt(messages=messages, reference=reference, **row.place)


def _text(row: _Row) -> Text:
    if not row.has("text"):
        raise row.lacks("text", "a string")
    return Text(text=row.text("text", empty=False), **row.place)
