"""The command line in this process: flags are absl's globals, so each call starts from fresh ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from absl import flags

from rlhf_jax.cli.main import run
from tests.train.runs import ROOT


@dataclasses.dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def _forget() -> None:
    """Takes back what the last command line set and defined."""
    for name in list(flags.FLAGS):
        if name.startswith("config."):
            delattr(flags.FLAGS, name)
        elif name in ("config", "workdir", "profile", "markdown"):
            flags.FLAGS[name].unparse()


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
