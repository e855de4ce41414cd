"""Local JSONL to records, streamed; the field's formats are recognised row by row from the fields present.

demo: `messages` | `prompt` + `completion` | `instruction` (+ `input`) + `output` (Alpaca) | `prompt` + `response`.
preference: `prompt` + `chosen` + `rejected`, or `chosen` + `rejected` as whole conversations with a common beginning; `margin`.
ranking: `prompt` + `responses`, best first, or `prompt` + `completions` + `scores`, which must differ.
feedback: `label` (true: good), rating: `score` (a number); each with `prompt` + `completion` | `prompt` + `response` | `messages`, whose last
message is what is judged. stepwise: `prompt` + `completions` (the steps of one answer) + `labels` (true or false, one per step).
prompt: `prompt` | `messages`, with `reference` (an object), else the row's other fields, kept for verifiers. text: `text`.
A message has `role` and `content`, and may have `name`, `tool_call_id`, `tool_calls` and `reasoning_content`; any row of messages may
have `tools`, a list of JSON schemas.
No row is dropped: a malformed one stops the reading with `file:line field expected …, got …; remedy`. Blank lines are no rows;
a byte-order mark and CRLF are accepted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax.data.records import (
    KINDS,
    ROLES,
    Demo,
    Feedback,
    Message,
    Messages,
    Preference,
    Prompt,
    Ranking,
    Rating,
    Record,
    Stepwise,
    Text,
    Tools,
)
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
      kind: one of `records.KINDS`.
      path: see `data_files`.

    Raises:
      UserError: a file is missing or empty, or a row is malformed (`file:line field expected …, got …; remedy`).
    """
    if kind not in KINDS:
        raise UserError(f"config.data.kind expected a kind of record, got {kind!r}{nearest(kind, KINDS)}")
    parsers: Mapping[str, Callable[[JsonRow], Record]] = {
        "demo": _demo, "text": _text, "preference": _preference, "ranking": _ranking, "feedback": _feedback, "rating": _rating,
        "stepwise": _stepwise, "prompt": _prompt,
    }
    for file in data_files(path):
        empty = True
        for row in json_rows(file):
            empty = False
            yield parsers[kind](row)
        if empty:
            raise UserError(f"{file}:1 row expected a JSON object, got an empty file; write one {kind} per line")


class JsonRow:
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
        return self._conversation(field, self.fields.get(field))

    def _conversation(self, field: str, value: Any) -> Messages:
        if not isinstance(value, list) or not value:
            raise self.bad(field, "a non-empty list of messages", value, 'write [{"role": "user", "content": "…"}, …]')
        return tuple(self._message(f"{field}[{i}]", item) for i, item in enumerate(value))

    def _message(self, field: str, item: Any) -> Message:
        if not isinstance(item, dict):
            raise self.bad(field, 'an object with "role" and "content"', item, "write each message as an object")
        role = item.get("role")
        if role not in ROLES:
            raise self.bad(f"{field}.role", f"one of {', '.join(ROLES)}", role, "rename the role")
        calls = self.objects(f"{field}.tool_calls", item.get("tool_calls"))
        content = "" if calls and item.get("content") is None else self.checked(f"{field}.content", item.get("content"))
        message = Message(role=role, content=content)
        for name in ("name", "tool_call_id", "reasoning_content"):
            if item.get(name) is not None:
                message[name] = self.checked(f"{field}.{name}", item[name])  # type: ignore[literal-required]
        if calls:
            message["tool_calls"] = calls
        return message

    def objects(self, field: str, value: Any) -> list[dict[str, Any]]:
        """`value` as a list of objects; nothing there is an empty one."""
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.bad(field, "a list of objects", value, "write each call or schema as an object")
        self.checked(field, json.dumps(value, ensure_ascii=False))
        return value

    def turns(self, field: str, role: str) -> Messages:
        """A field that holds messages, or a string said by `role`."""
        return self.spoken(field, self.fields.get(field), role)

    def spoken(self, field: str, value: Any, role: str) -> Messages:
        """`value`, which is messages or a string said by `role`; `field` names it in complaints."""
        if isinstance(value, list):
            return self._conversation(field, value)
        if not isinstance(value, str):
            raise self.bad(field, "a string or a list of messages", value, "write the text as a JSON string")
        return (Message(role=role, content=self.checked(field, value)),)

    def several(self, field: str, least: int, expected: str) -> list[Any]:
        """A field that holds a list of at least `least` entries."""
        value = self.fields.get(field)
        if not isinstance(value, list) or len(value) < least:
            raise self.bad(field, expected, value, "fill the list or remove the row")
        return value

    def number(self, field: str, value: Any, remedy: str) -> float:
        """`value` as a finite float that float32 holds."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise self.bad(field, "a finite number", value, remedy)
        return float(value)

    def verdict(self, field: str, value: Any) -> bool:
        """`value`, true or false."""
        if not isinstance(value, bool):
            raise self.bad(field, "true or false", value, "write true for good or right, false for bad or wrong")
        return value

    @property
    def place(self) -> dict[str, Any]:
        return {"source": self.source, "line": self.line}

    @property
    def tools(self) -> Tools:
        return tuple(self.objects("tools", self.fields.get("tools")))


class _Literal(str):
    """Text shown as it stands in a message."""


def _show(value: Any) -> str:
    if isinstance(value, _Literal):
        return str(value)
    if value is None:
        return "nothing"
    shown = ascii(value) if isinstance(value, str) else json.dumps(value, default=str)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def json_rows(file: str) -> Iterator[JsonRow]:
    """The objects of a .jsonl file, in order.

    Args:
      file: its path.

    Raises:
      UserError: a line is no UTF-8 or no JSON object.
    """
    with open(file, "rb") as stream:
        for line, raw in enumerate(stream, start=1):
            raw = raw.removeprefix(_BOM) if line == 1 else raw
            blank = JsonRow({}, file, line)
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
            yield JsonRow(fields, file, line)


def _demo(row: JsonRow) -> Demo:
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
    return Demo(messages=messages, context=len(prompt), tools=row.tools, **row.place)


def _prompted(row: JsonRow, field: str) -> tuple[Messages, Messages]:
    prompt = row.turns("prompt", "user")
    return prompt, prompt + row.turns(field, "assistant")


def _preference(row: JsonRow) -> Preference:
    if not row.has("chosen", "rejected"):
        raise row.lacks("chosen", "prompt + chosen + rejected, or chosen + rejected as whole conversations")
    chosen, rejected = row.turns("chosen", "assistant"), row.turns("rejected", "assistant")
    prompt = row.turns("prompt", "user") if row.has("prompt") else _common_prompt(row, chosen, rejected)
    if prompt == chosen[: len(prompt)] and prompt == rejected[: len(prompt)]:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for field, branch in (("chosen", chosen), ("rejected", rejected)):
        _check_response(row, field, branch)
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, margin=_margin(row), tools=row.tools, **row.place)


def _check_response(row: JsonRow, field: str, branch: Messages) -> None:
    if not branch or branch[-1]["role"] != "assistant":
        raise row.bad(field, "a response ending with an assistant message", list(branch), "add the response or remove the row")
    if branch[0]["role"] != "assistant":
        raise row.bad(field, "the same conversation as the prompt, then an answer", list(branch), "make the prompt a prefix of it")


def _response(row: JsonRow, field: str, value: Any, prompt: Messages) -> Messages:
    """What answers the prompt, which messages may repeat at their beginning."""
    said = row.spoken(field, value, "assistant")
    branch = said[len(prompt) :] if said[: len(prompt)] == prompt else said
    _check_response(row, field, branch)
    return branch


def _answered(row: JsonRow) -> tuple[Messages, Messages]:
    """Prompt and response of a row that judges one answer; of `messages` the last one is judged."""
    if row.has("messages"):
        messages = row.messages("messages")
        if len(messages) < 2:
            raise row.bad("messages", "a prompt and the answer to it", list(messages), "write the whole conversation")
        return messages[:-1], _response(row, "messages", list(messages[-1:]), messages[:-1])
    for field in ("completion", "response"):
        if row.has("prompt", field):
            prompt = row.turns("prompt", "user")
            return prompt, _response(row, field, row.fields[field], prompt)
    raise row.lacks("completion", "prompt + completion, prompt + response, or messages")


def _feedback(row: JsonRow) -> Feedback:
    prompt, response = _answered(row)
    return Feedback(prompt=prompt, response=response, desirable=row.verdict("label", row.fields.get("label")), tools=row.tools, **row.place)


def _rating(row: JsonRow) -> Rating:
    prompt, response = _answered(row)
    score = row.number("score", row.fields.get("score"), "write the response's score as a number")
    return Rating(prompt=prompt, response=response, score=score, tools=row.tools, **row.place)


def _ranking(row: JsonRow) -> Ranking:
    field = "responses" if row.has("responses") else "completions"
    if not row.has("prompt", field) or (field == "completions" and not row.has("scores")):
        raise row.lacks("responses", "prompt + responses (best first), or prompt + completions + scores")
    prompt = row.turns("prompt", "user")
    values = row.several(field, 2, "a list of at least two responses")
    responses = [_response(row, f"{field}[{i}]", value, prompt) for i, value in enumerate(values)]
    if field == "completions":
        responses = [responses[i] for i in _best_first(row, len(responses))]
    return Ranking(prompt=prompt, responses=tuple(responses), tools=row.tools, **row.place)


def _best_first(row: JsonRow, count: int) -> list[int]:
    """The order of falling scores. A tie has no order: it is refused."""
    listed = row.several("scores", count, f"a list of {count} numbers, one per completion")
    scores = [row.number(f"scores[{i}]", value, "write one number per completion") for i, value in enumerate(listed)]
    if len(scores) != count:
        raise row.bad("scores", f"{count} numbers, one per completion", listed, "write one number per completion")
    if len(set(scores)) < count:
        raise row.bad("scores", "numbers that all differ", listed, "leave out all but one of the tied responses")
    return sorted(range(count), key=lambda i: -scores[i])


def _stepwise(row: JsonRow) -> Stepwise:
    if not row.has("prompt", "completions", "labels"):
        raise row.lacks("completions", "prompt + completions (the steps of one answer) + labels")
    prompt = row.turns("prompt", "user")
    steps = [row.checked(f"completions[{i}]", step, empty=False) for i, step in enumerate(row.several("completions", 1, "a list of steps"))]
    listed = row.several("labels", 1, "a list of true and false, one per step")
    labels = [row.verdict(f"labels[{i}]", label) for i, label in enumerate(listed)]
    if len(labels) != len(steps):
        raise row.bad("labels", f"{len(steps)} labels, one per step", listed, "label every step")
    return Stepwise(prompt=prompt, steps=tuple(steps), labels=tuple(labels), tools=row.tools, **row.place)


def _common_prompt(row: JsonRow, chosen: Messages, rejected: Messages) -> Messages:
    """The shared beginning of two conversations, leaving each at least its last message and starting with the assistant's turn."""
    if not (isinstance(row.fields["chosen"], list) and isinstance(row.fields["rejected"], list)):
        raise row.lacks("prompt", "a string or a list of messages, because chosen and rejected are strings")
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    if length == 0:
        raise row.bad("chosen", "a beginning in common with rejected", list(chosen[:1]), "start both with the prompt or add a prompt field")
    return chosen[:length]


def _margin(row: JsonRow) -> float | None:
    value = row.fields.get("margin")
    return None if value is None else row.number("margin", value, "write how much better chosen is, or leave margin out")


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(float(value)) and abs(float(value)) < 3e38  # float32 holds it
    except OverflowError:
        return False


def _prompt(row: JsonRow) -> Prompt:
    field = "prompt" if row.has("prompt") else "messages"
    if not row.has(field):
        raise row.lacks("prompt", "prompt (a string or a list of messages) or messages")
    messages = row.turns(field, "user") if field == "prompt" else row.messages(field)
    if messages[-1]["role"] == "assistant":
        raise row.bad(field, "a conversation that waits for an answer", list(messages[-1:]), "end it with a user message")
    reference = row.fields.get("reference")
    if reference is None:
        reference = {name: value for name, value in row.fields.items() if name not in (field, "reference", "tools")} or None
    elif not isinstance(reference, dict):
        raise row.bad("reference", "an object", reference, 'write what a verifier needs as {"answer": …}')
    return Prompt(messages=messages, reference=reference, tools=row.tools, **row.place)


def _text(row: JsonRow) -> Text:
    if not row.has("text"):
        raise row.lacks("text", "a string")
    return Text(text=row.text("text", empty=False), **row.place)
