"""Chat templates: a conversation to text, and which characters of it the assistant says.

Templates run in another process (`template_worker.py`), one for all of this process: jinja2's immutable sandbox does not stop
`'a' * 10**9` or nested loops, so the worker has a memory limit and the caller a clock; what ends it ends it for all, and the next
rendering begins a new one. `{% generation %}…{% endgeneration %}` marks the assistant's text,
through marks around the block that are removed after rendering, so it works inside macros and captured blocks as well.
A template without the block falls back to prefix differences: what a message adds to the conversation before it, without the header
that `add_generation_prompt` writes and without what follows the end token (a line break; Phi-3's end of document).
Deviation: the usual tooling gives an all-zero mask there (huggingface/transformers `return_assistant_tokens_mask`), and its clock
(`strftime_now`) is the real one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax.data import template_worker
from rlhf_jax.data.records import Message
from rlhf_jax.data.tokenizer import unused_characters
from rlhf_jax.errors import UserError, nearest

Span = tuple[int, int]
_KEY = "config.data.template"
TEMPLATES = 64  # of one process; another one takes its place then


class ChatTemplate:
    """A named or given template.

    Args:
      source: the jinja text.
      name: how messages call it.
      variables: what the template may read besides messages and tools, e.g. {"bos_token": "<|bos|>", "enable_thinking": False}; JSON
        values, and one that is None stays undefined.
    """

    def __init__(self, source: str, *, name: str = "template", variables: Mapping[str, Any] | None = None) -> None:
        self.source, self.name, self.shipped = source, name, False
        self.variables = {key: value for key, value in (variables or {}).items() if value is not None}
        self._marks_assistant = False  # known once it has rendered

    @classmethod
    def load(cls, name: str, *, variables: Mapping[str, Any] | None = None) -> ChatTemplate:
        """A shipped template by name, or any by file path.

        Raises:
          UserError: it is neither.
        """
        folder = importlib.resources.files("rlhf_jax.data") / "templates"
        shipped = {item.name.removesuffix(".jinja"): item for item in folder.iterdir() if item.name.endswith(".jinja")}
        if name in shipped:
            template = cls(shipped[name].read_text(encoding="utf-8"), name=name, variables=variables)
            template.shipped = True
            return template
        if not os.path.isfile(name):
            raise UserError(f"{_KEY} expected a shipped template or a file, got {name!r}{nearest(name, shipped)}; check the name")
        try:
            with open(name, encoding="utf-8-sig") as stream:
                return cls(stream.read(), name=name, variables=variables)
        except UnicodeDecodeError:
            raise UserError(f"{_KEY} expected a UTF-8 text file, got {name!r}; save it as UTF-8") from None

    @property
    def digest(self) -> str:
        """Hex digest of all that decides what is rendered."""
        return hashlib.sha256(json.dumps([self.source, sorted(self.variables.items())]).encode()).hexdigest()

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False, *, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The conversation as text.

        Args:
          messages, add_generation_prompt, tools: see `render`.

        Raises:
          UserError: the template is no jinja, refuses the conversation, or exceeds its limits.
        """
        return self._marked(messages, add_generation_prompt, tools)[0]

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, *, tools: Sequence[Mapping[str, Any]] = (), context: int = 0,
        end: str | None = None,
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and the character spans [start, end) of what the assistant says, in order.

        Args:
          messages: the turns.
          add_generation_prompt: end with the header after which the assistant speaks.
          tools: JSON schemas of the functions that the assistant may call.
          context: the first messages need no spans: a template without the block may rewrite them.
          end: the end token, if known: what stands behind it is not said. No message may contain it.

        Raises:
          UserError: the template is no jinja, refuses the conversation, exceeds its limits, or its spans cannot be told.
        """
        text, spans = self._marked(messages, add_generation_prompt, tools)
        if self._marks_assistant:
            return text, [self._without_layout(text, span, end) for span in spans]
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= context]
        return text, [self._difference(messages, i, text, tools, end) for i in said]

    def _marked(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[str, list[Span]]:
        opening, closing = unused_characters([self.source, *strings([*messages, *tools])], 2)
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables: dict[str, Any] = {"tools": list(tools) or None, "documents": None, **self.variables}
        variables |= {"messages": given, "add_generation_prompt": add_generation_prompt}
        text = self._ask(variables | {template_worker.OPEN: opening, template_worker.CLOSE: closing})
        clean, spans, length, start = [], [], 0, None
        for piece in re.split(f"([{opening}{closing}])", text):
            if piece == opening:
                start = length if start is None else start
            elif piece == closing:
                if start is not None and length > start:
                    spans.append((start, length))
                start = None
            else:
                clean.append(piece)
                length += len(piece)
        return "".join(clean), spans

    @staticmethod
    def _without_layout(text: str, span: Span, end: str | None) -> Span:
        """A marked span; a block may close behind the line break after the end token."""
        said = text[span[0] : span[1]].rstrip()
        return (span[0], span[0] + len(said)) if end and said.endswith(end) else span

    def _difference(self, messages: Sequence[Message], index: int, text: str, tools: Sequence[Mapping[str, Any]], end: str | None) -> Span:
        before = self._marked(messages[:index], True, tools)[0]
        after = self._marked(messages[: index + 1], False, tools)[0]
        start, stop = len(before), len(after)
        if end is not None and (found := after.find(end, start)) >= 0:
            stop = found + len(end)
        else:
            content = (messages[index].get("content") or "").strip()
            behind = after.find(content, start) + len(content) if content in after[start:] else start
            tail = after[behind:]
            if tail.strip():  # white space behind the end token is layout, not speech
                stop -= len(tail) - len(tail.rstrip())
        if not (after.startswith(before) and text.startswith(after[:stop])):
            raise UserError(
                f"{_KEY} expected a template whose every turn only adds text, got {self.name!r}, which rewrites turn {index}; "
                "put {% generation %}…{% endgeneration %} around what the assistant says"
            )
        return start, stop

    def _ask(self, variables: Mapping[str, object]) -> str:
        try:
            text, self._marks_assistant = _rendered(self.source, variables)
        except _Refused as error:
            got = f"{self.name!r}: {error}"
            raise UserError(f"{_KEY} expected a template that renders the conversation, got {got}; correct it") from None
        return text


def strings(value: Any) -> Iterator[str]:
    """Every text in messages or tools, at any depth; keys are none.

    Args:
      value: JSON.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def rewritten(value: Any, texts: Iterator[str]) -> Any:
    """`value` with each text that `strings` found replaced by the next of `texts`.

    Args:
      value: JSON.
      texts: as many as `strings(value)` yields.
    """
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, Mapping):
        return {key: rewritten(item, texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rewritten(item, texts) for item in value]
    return value


class _Refused(Exception):
    """Why the worker has no text."""


class _Worker:
    """A rendering process; it ends with its owner."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", os.path.abspath(template_worker.__file__)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._rest = b""
        self._seconds = 4 * template_worker.SECONDS  # of the first template: it starts Python
        self._compiled: dict[str, tuple[int, bool]] = {}  # by source: its number, and whether it marks what the assistant says
        self._closed = False

    @property
    def dead(self) -> bool:
        """Whether it has been ended, by this process or another one."""
        return self._closed or self._process.poll() is not None

    @property
    def full(self) -> bool:
        """Whether it holds as many templates as one process may."""
        return len(self._compiled) >= TEMPLATES

    def render(self, source: str, variables: Mapping[str, object]) -> tuple[str, bool]:
        """The text, and whether the template marks what the assistant says."""
        if source not in self._compiled:
            number = len(self._compiled)
            self._compiled[source] = number, self.ask({"template": number, "source": source}, self._seconds)["generation"]
            self._seconds = template_worker.SECONDS
        number, marks = self._compiled[source]
        return self.ask({"template": number, "variables": variables})["text"], marks

    def ask(self, question: Mapping[str, object], seconds: float = template_worker.SECONDS) -> dict:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            reply = json.loads(self._line(time.monotonic() + seconds, seconds))
        except BrokenPipeError:
            self.close()
            raise _Refused("its process ended") from None
        except BaseException:  # an interrupt, for one: the answer that it leaves unread would be taken for the next one's
            self.close()
            raise
        if "error" in reply:
            raise _Refused(reply["error"])
        return reply

    def _line(self, deadline: float, seconds: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            pieces = [self._rest]
            while b"\n" not in pieces[-1]:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    self.close()
                    raise _Refused(f"it took more than {seconds:g} s")
                pieces.append(os.read(self._process.stdout.fileno(), 1 << 20))
                if not pieces[-1]:
                    self.close()
                    raise _Refused("its process ended")
        line, self._rest = b"".join(pieces).split(b"\n", 1)
        return line

    def close(self) -> None:
        self._closed = True
        self._finalizer()


_lock = threading.Lock()
_shared: list[_Worker] = []  # one at most


def _rendered(source: str, variables: Mapping[str, object]) -> tuple[str, bool]:
    """As `_Worker.render`, by the one worker of this process."""
    with _lock:
        if not _shared or _shared[0].dead or _shared[0].full:
            _shared[:] = [_Worker()]
        return _shared[0].render(source, variables)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()
