"""Programs on PATH that answer what a test tells them, and write down how they were called."""

from __future__ import annotations

import json
import os
import pathlib
import sys

import pytest

SOURCE = """#!{python} -IS
import json, os, sys
here, name = {folder!r}, {name!r}
with open(os.path.join(here, name + ".calls"), "a") as stream:
    stream.write(json.dumps(sys.argv[1:]) + "\\n")
for number, (words, answers) in enumerate(json.load(open(os.path.join(here, name + ".json")))):
    if all(any(word in one for one in sys.argv[1:]) for word in words):
        count = os.path.join(here, name + "." + str(number))
        done = len(open(count).read()) if os.path.exists(count) else 0
        open(count, "a").write("x")
        code, text = answers[min(done, len(answers) - 1)]
        print(text)
        sys.exit(code)
sys.exit(0)
"""


class Tools:
    """Fake programs in one folder.

    Args:
      folder: on PATH.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def add(self, name: str, *rules: tuple[tuple[str, ...], list[tuple[int, str]]]) -> None:
        """A program: for the first rule whose words are all in its arguments, one (exit code, output) a call, the last one for ever; else 0."""
        (self.folder / f"{name}.json").write_text(json.dumps(rules))
        path = self.folder / name
        path.write_text(SOURCE.format(python=sys.executable, folder=str(self.folder), name=name))
        path.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        """The argument lists with which it was called."""
        path = self.folder / f"{name}.calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def tools(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """An empty folder of fake programs, the first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Tools(folder)
