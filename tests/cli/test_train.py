"""`rlhf-jax train` as a user calls it: every config's `:tiny` trains, saves and resumes; --help explains itself."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest

from rlhf_jax.cli import main as cli
from rlhf_jax.cli import train as train_command
from rlhf_jax.train.programs import Programs
from tests.cli.conftest import Command
from tests.train.runs import CONFIGS, ROOT, metrics, outcome, steps

NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
FASTER = [f"--config.model.{key}={value}" for key, value in {"hidden": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "layers": 1}.items()]


@pytest.fixture
def advanced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that were advanced by, in order."""
    seen: list[int] = []
    advance = Programs.advance

    def record(self: Programs, state: Any, batch: Any) -> Any:
        seen.append(int(state.batch_index))
        return advance(self, state, batch)

    monkeypatch.setattr(Programs, "advance", record)
    return seen


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "ppo" else pytest.mark.slow) for name in NAMES])
def test_tiny_trains_saves_and_resumes(name: str, command: Command, advanced: list[int], tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    line = ["train", f"--config={CONFIGS / name}.py:tiny", f"--workdir={run}", "--config.checkpoint.keep=4", "--config.log.samples=2"]
    first = command(*line)
    assert first.code == 0, first.err
    assert "finished at step 4" in first.out
    assert advanced == [0, 1, 2, 3]
    assert steps(run / "checkpoints") == [1, 2, 3, 4]
    undisturbed = outcome(run)
    assert [row["step"] for row in metrics(run)] == [1, 2, 2, 3, 4, 4], "a line per step and per validation"

    # The state of a run that was stopped after two steps: the log has run ahead of the checkpoint.
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / str(step))
    (run / "final.json").unlink()
    advanced.clear()
    second = command(*line)
    assert second.code == 0, second.err
    assert advanced == [2, 3]
    assert outcome(run) == undisturbed
    assert second.out == first.out

    advanced.clear()
    third = command(*line)
    assert (third.code, third.out, advanced) == (0, first.out, []), "a finished run has nothing left to do"
    assert outcome(run) == undisturbed


def test_interrupted_after_two_steps(command: Command, advanced: list[int], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in step 3: one line, exit code 130, and the same command goes on."""
    line = ["train", f"--config={CONFIGS / 'sft.py'}:tiny", *FASTER]
    whole = command(*line, f"--workdir={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    advanced.clear()

    record = Programs.advance
    with monkeypatch.context() as patch:

        def interrupted(self: Programs, state: Any, batch: Any) -> Any:
            if len(advanced) == 2:
                raise KeyboardInterrupt
            return record(self, state, batch)

        patch.setattr(Programs, "advance", interrupted)
        stopped = command(*line, f"--workdir={tmp_path / 'run'}")
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == "rlhf-jax: interrupted; the same command goes on from the last checkpoint"
    assert not (tmp_path / "run" / "final.json").exists()
    assert max(steps(tmp_path / "run" / "checkpoints")) == 2

    resumed = command(*line, f"--workdir={tmp_path / 'run'}")
    assert resumed.code == 0, resumed.err
    assert advanced == [0, 1, 2, 3]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_overrides_arrive(command: Command, tmp_path: pathlib.Path) -> None:
    flags = ["--config.run.steps=1", "--config.optimizer.lr=3e-4", "--noconfig.data.pack", "--config.validation.every=0"]
    ended = command("train", f"--config={CONFIGS / 'sft.py'}:tiny", f"--workdir={tmp_path}", *FASTER, *flags)
    assert ended.code == 0, ended.err
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["run"]["steps"], config["optimizer"]["lr"], config["data"]["pack"], config["model"]["hidden"]) == (1, 3e-4, False, 16)
    assert [row["optimizer/lr"] for row in metrics(tmp_path)] == [pytest.approx(3e-4)]


@pytest.mark.parametrize("count", [3, 6])
def test_profile(count: int, command: Command, tmp_path: pathlib.Path) -> None:
    """A trace is written, also when the run ends before the traced steps do; a second one can follow in the same process."""
    flags = ["--profile", f"--config.run.steps={count}", "--config.validation.every=0", "--config.checkpoint.every=0"]
    ended = command("train", f"--config={CONFIGS / 'sft.py'}:tiny", f"--workdir={tmp_path}", *FASTER, *flags)
    assert ended.code == 0, ended.err
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], ["help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert said.startswith("usage: rlhf-jax COMMAND")
        for name, explained in cli.COMMANDS.items():
            assert f"  {name}" in said and explained in said
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2


def test_help_of_train(command: Command) -> None:
    ended = command("train", "--help")
    assert (ended.code, ended.err) == (0, "")
    for flag, explained in train_command.FLAGS_HELP.items():
        assert f"  {flag}\n      {explained}" in ended.out
    for needed in ("--config", "--workdir", "profile", "rlhf-jax train --config configs/sft.py"):
        assert needed in ended.out
    assert max(map(len, ended.out.splitlines())) <= 160, "a person reads this in a terminal"


def test_help_in_a_process_of_its_own() -> None:
    """The installed script; help neither imports JAX nor needs a config."""
    script = pathlib.Path(sys.executable).with_name("rlhf-jax")
    for arguments in (["--help"], ["train", "--help"]):
        ended = subprocess.run([script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
        assert "rlhf-jax" in ended.stdout
