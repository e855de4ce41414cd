"""The process that renders chat templates: jinja2's immutable sandbox under limits that the sandbox itself does not set.

`'a' * 10**9`, a filter with a huge width or nested loops pass jinja2's sandbox; the address-space limit here stops the first two
and the clock the third. `chat.py` runs this file as a script, so that it imports nothing but jinja2. One JSON object per line each
way: {"template": number, "source"} once for each template, answered by {"generation"}: does it have the block; then {"template", "variables"} per
conversation, answered by {"text"}. Either may be answered by {"error"}. A template has its own environment; none sees another.
"""

from __future__ import annotations

import datetime
import json
import signal
import sys

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

MEMORY = 1 << 29  # bytes of address space
CHARACTERS = 1 << 22  # of one rendered conversation
TODAY = datetime.datetime(2024, 7, 26)  # what `strftime_now` reads; the date Llama 3's own template writes where there is no clock
SECONDS = 5  # for one conversation; the parent's clock ends a rendering first, this one if the parent is gone
OPEN, CLOSE = "generation_open", "generation_close"  # variables: the marks put around what the assistant says


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant says, put between two marks that the parent chose."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own protocol

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    @staticmethod
    def mark(context, caller):
        return context.resolve(OPEN) + caller() + context.resolve(CLOSE)


def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox, with the block, white-space settings, filter and functions that chat templates expect of `transformers`.

    Deviation: `strftime_now` gives a fixed date, so that a conversation is the same text on every day and prepared data can be kept.
    """
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime, "namespace": _Names}
    return sandbox


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Names(Namespace):
    """A template's mutable variables, without the names that Python itself would call past the sandbox, `__html__` for one."""

    def __init__(*args, **named):  # a template may name one of its variables `self`
        names, *given = args
        variables = dict(*given, **named)
        for name in variables:
            _check_name(name)
        Namespace.__init__(names, variables)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name):
    if str(name).startswith("_"):
        raise SecurityError(f"a variable of a namespace may not begin with an underscore: {name!r}")


def _refuse(message):
    raise TemplateError(str(message))


def _limit() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # a platform without the limit keeps the clock and the cap on characters


def _answer(question: str, compiled: dict) -> None:
    try:
        signal.alarm(SECONDS + 1)
        asked = json.loads(question)
        reply = (_compile if "source" in asked else _render)(asked, compiled)
    except MemoryError:
        reply = {"error": f"it needed more than {MEMORY >> 20} MiB"}
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    finally:
        signal.alarm(0)
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def _compile(asked: dict, compiled: dict) -> dict:
    sandbox = environment()
    compiled[asked["template"]] = sandbox.from_string(asked["source"])
    marks = sandbox.parse(asked["source"]).find_all(nodes.ExtensionAttribute)
    return {"generation": any(mark.identifier == Generation.identifier for mark in marks)}


def _render(asked: dict, compiled: dict) -> dict:
    size, pieces = 0, []
    for piece in compiled[asked["template"]].generate(**asked["variables"]):
        size += len(piece)
        if size > CHARACTERS:
            return {"error": f"it wrote more than {CHARACTERS} characters"}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def main() -> None:
    """Compiles a template or renders a conversation per line until the input closes."""
    _limit()
    compiled: dict = {}
    for question in sys.stdin:
        _answer(question, compiled)


if __name__ == "__main__":
    main()
