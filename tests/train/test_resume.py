"""Killed anywhere, the same command again ends as a run that was never killed: state hash, metrics and samples, byte for byte (law 8)."""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from typing import Any

import pytest

from rlhf_jax import checkpoint
from rlhf_jax.train import loop
from rlhf_jax.train.loop import train
from tests.train.conftest import command
from tests.train.killed import POINTS, before
from tests.train.runs import ROOT, arguments, outcome, rows, steps, tiny

# Packed rows, pairs, pairs with a reference, fused, with the host between, with a second data set; with rollouts in flight, a memory and a moved
# reference, with a cursor of its own.
NAMES = ["sft", "reward", "dpo", "ppo", "grpo", "ppo_ptx", "ahead", "refill"]
ONLINE = ("ppo", "grpo", "ppo_ptx", "ahead", "refill")


class Crash(Exception):
    """Not a UserError: nothing in the package expects it."""


def same_end(run: pathlib.Path, whole: pathlib.Path) -> None:
    found, expected = outcome(run), outcome(whole)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, f"{name} differs"
    assert steps(run / "checkpoints") == steps(whole / "checkpoints")
    assert steps(run / "best") == steps(whole / "best")
    best, expected_best = (checkpoint.load_params(str(folder), key="best", which="best") for folder in (run, whole))
    assert checkpoint.tree_digest(best[0]) == checkpoint.tree_digest(expected_best[0])
    assert best[1].keys() == expected_best[1].keys() and best[1] == {**expected_best[1], "checkpoint": best[1]["checkpoint"]}  # its own path


# --- in this process: an exception that nobody expects ---


def crash(name: str, changes: dict[str, Any], run: pathlib.Path, point: tuple[Any, str], number: int) -> None:
    """Runs until the `number`-th call of `point`, which raises."""

    def fail() -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*point, getattr(*point))  # so that it is put back
        before(*point, number, fail)
        with pytest.raises(Crash):
            train(tiny(name, changes), str(run))


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "sft" else pytest.mark.slow) for name in NAMES])
def test_crash_in_training(name: str, finished: Any, tmp_path: pathlib.Path) -> None:
    """In step 4, after the checkpoint of step 2 and the validation of step 3, whose lines are logged already."""
    config, changes = command(f"uneven_{name}", finished)
    crash(config, changes, tmp_path / "run", POINTS["training"], 4)
    assert steps(tmp_path / "run" / "checkpoints") == [2]
    assert max(line["step"] for line in rows(tmp_path / "run" / "metrics.jsonl")) == 3
    assert not (tmp_path / "run" / "final.json").exists()
    train(tiny(config, changes), str(tmp_path / "run"))
    same_end(tmp_path / "run", finished(f"uneven_{name}"))


MOMENTS = [(1, [], []), (2, [2], []), (3, [2], [3]), (4, [2, 4], [3]), (5, [2, 4], [6])]


@pytest.mark.parametrize(
    ("number", "checkpoints", "best"), [pytest.param(*moment, marks=() if moment[0] == 5 else pytest.mark.slow) for moment in MOMENTS]
)
def test_crash_before_a_save(number: int, checkpoints: list[int], best: list[int], finished: Any, tmp_path: pathlib.Path) -> None:
    """Saves come in the order 2, best 3, 4, best 6, 6: wherever it breaks off, the best one is not lost."""
    config, changes = command("uneven_sft", finished)
    crash(config, changes, tmp_path / "run", POINTS["saving"], number)
    found = [steps(folder) if folder.exists() else [] for folder in (tmp_path / "run" / "checkpoints", tmp_path / "run" / "best")]
    assert found == [checkpoints, best]
    train(tiny(config, changes), str(tmp_path / "run"))
    same_end(tmp_path / "run", finished("uneven_sft"))


def test_newest_checkpoint_damaged(finished: Any, tmp_path: pathlib.Path) -> None:
    """It is set aside and the run goes on from the one before."""
    config, changes = command("uneven_sft", finished)
    run = tmp_path / "run"
    shutil.copytree(finished("uneven_sft"), run)
    (run / "final.json").unlink()
    data = max((run / "checkpoints" / "6" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    train(tiny(config, changes), str(run))
    assert (run / "checkpoints" / "quarantine" / "6").exists()
    same_end(run, finished("uneven_sft"))


@pytest.mark.slow
def test_every_checkpoint_lost(finished: Any, tmp_path: pathlib.Path) -> None:
    """The run starts again, and so do its logs."""
    config, changes = command("uneven_ppo", finished)
    shutil.copytree(finished("uneven_ppo"), tmp_path / "run")
    for step in steps(tmp_path / "run" / "checkpoints"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    train(tiny(config, changes), str(tmp_path / "run"))
    same_end(tmp_path / "run", finished("uneven_ppo"))


def test_samples_are_cut_back_by_bytes(tmp_path: pathlib.Path) -> None:
    """A response may hold what str.splitlines takes for an end of line, and a killed writer leaves half a character."""
    lines = ['{"step": 1, "response": "a\u2028b\x85c"}\n', '{"step": 2, "response": "é"}\n', '{"step": 3, "response": "f"}\n']
    torn = '{"step": 2, "response": "é'.encode()[:-1]
    (tmp_path / "samples.jsonl").write_bytes("".join(lines).encode() + torn)
    loop._cut_samples(tmp_path, 2)
    assert (tmp_path / "samples.jsonl").read_bytes() == "".join(lines[:2]).encode()
    loop._cut_samples(tmp_path, 1)
    assert (tmp_path / "samples.jsonl").read_bytes() == lines[0].encode()


# --- a process of its own, and SIGKILL ---


def process(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *line], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300, check=False)


def kill(name: str, changes: dict[str, Any], run: pathlib.Path, point: str, number: int, seconds: float) -> None:
    ended = process(["-m", "tests.train.killed", point, str(number), f"{seconds:.3f}", *arguments(name, changes, run)])
    assert ended.returncode == -signal.SIGKILL, (point, number, seconds, ended.returncode, ended.stderr)
    assert not (run / "final.json").exists()


# (point, the numbers of calls to choose from, the largest delay [s]): the second save is the first best one, in progress when the kill comes
CASES = {
    "sft": ("saving", (2, 3, 4), 0.15), "reward": ("training", (2, 3, 4), 0.2), "dpo": ("saving", (2, 3), 0.15), "ppo": ("training", (3, 4, 5), 0.3),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "ppo" else pytest.mark.slow) for name in CASES])
def test_kill(name: str, finished: Any, tmp_path: pathlib.Path) -> None:
    """One kill, then the same command, which is the reader's `rlhf-jax train`."""
    whole = finished(f"uneven_{name}")
    config, changes = command(f"uneven_{name}", finished)
    point, numbers, longest = CASES[name]
    chance = random.Random(f"{name} killed")
    kill(config, changes, tmp_path / "run", point, chance.choice(numbers), chance.uniform(0, longest))
    again = process(["-m", "rlhf_jax.cli.main", "train", *arguments(config, changes, tmp_path / "run")])
    assert again.returncode == 0, again.stderr
    same_end(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_killed_again_and_again(name: str, seed: int, finished: Any, tmp_path: pathlib.Path) -> None:
    """Every kind of moment in a random order, each time from where the last one left the run."""
    whole = finished(f"uneven_{name}")
    config, changes = command(f"uneven_{name}", finished)
    chance = random.Random(f"{name} {seed}")
    moments = ["training", "saving", "validation", "logging"]
    moments += ["sampling"] if name in ONLINE else []
    moments += ["rewarding"] if name in ("grpo", "ahead", "refill") else []
    chance.shuffle(moments)
    for point in moments:
        # Each moment comes at least once in what is left of the run, as long as the last step is not saved.
        kill(config, changes, tmp_path / "run", point, 1, chance.choice([0, chance.uniform(0, 0.1)]))
    again = process(["-m", "rlhf_jax.cli.main", "train", *arguments(config, changes, tmp_path / "run")])
    assert again.returncode == 0, again.stderr
    same_end(tmp_path / "run", whole)
