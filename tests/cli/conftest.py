"""The command line in this process: flags are absl's globals, so each call starts from fresh ones."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import pytest
from absl import flags

from rlhf_jax.cli.main import COMMANDS, run
from tests.train.runs import ROOT


@dataclasses.dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]
PACKAGE = "rlhf_jax.cli."


def _forget() -> None:
    """Takes back what earlier command lines set and defined: a command's module is imported anew, since two may define flags of one name."""
    defined = [flag.name for module, found in flags.FLAGS.flags_by_module_dict().items() if module.startswith(PACKAGE) for flag in found]
    for name in {*defined, *(name for name in flags.FLAGS if name.startswith("config."))}:
        if name in flags.FLAGS:
            delattr(flags.FLAGS, name)
    for name in COMMANDS:
        sys.modules.pop(PACKAGE + name, None)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`command("train", "--config=…", …)` as `rlhf-jax train --config=… …`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(ROOT / ".cache"))  # prepared data

    def call(name: str, *arguments: str) -> Outcome:
        _forget()
        capfd.readouterr()
        code = run(name, list(arguments))
        return Outcome(code, *capfd.readouterr())

    return call
