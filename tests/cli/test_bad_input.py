"""A mistake on the command line: exit code 2, one line on stderr that names what is wrong, no traceback, nothing in the workdir."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.cli.conftest import Command
from tests.train.runs import CONFIGS, ROOT, write_rows

TINY = f"--config={CONFIGS / 'sft.py'}:tiny"
MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "misspelt key": ([TINY, "--config.optimizer.lrr=1"], ("config.optimizer.lrr", "'lr'")),
    "misspelt section": ([TINY, "--config.optmizer.lr=1"], ("config.optmizer", "'optimizer'")),
    "misspelt with one dash": ([TINY, "-config.model.hiden=16"], ("config.model.hiden", "'hidden'")),
    "misspelt negation": ([TINY, "--noconfig.data.pak"], ("config.data.pak", "'pack'")),
    "no number": ([TINY, "--config.model.hidden=abc"], ("config.model.hidden", "'abc'", "int")),
    "no number the second time": ([TINY, "--config.model.hidden=16", "--config.model.hidden=abc"], ("config.model.hidden", "'abc'")),
    "no whole number": ([TINY, "--config.run.steps=2.5"], ("config.run.steps", "'2.5'", "int")),
    "too large": ([TINY, "--config.run.steps=10000000000"], ("config.run.steps", "10000000000", "2147483647")),
    "no truth value": ([TINY, "--config.data.pack=maybe"], ("config.data.pack", "'maybe'", "bool")),
    "infinite rate": ([TINY, "--config.optimizer.lr=inf"], ("config.optimizer.lr", "inf", "finite")),
    "value left out": ([TINY, "--config.model.hidden"], ("config.model.hidden", "value")),
    "section set": ([TINY, "--config.model=3"], ("config.model", "section", "hidden")),
    "value taken for a section": ([TINY, "--config.seed.x=1"], ("config.seed", "config.seed.x")),
    "empty key": ([TINY, "--config.=3"], ("config.", "optimizer")),
    "override before the config": (["--config.run.steps=3", TINY], ("--config.run.steps=3", "--config")),
    "no config": ([], ("--config is missing", "configs/sft.py")),
    "config without a value": (["--config"], ("--config",)),
    "no such config": (["--config=none.py"], ("none.py", "no such file")),
    "config that is a folder": ([f"--config={CONFIGS}"], (str(CONFIGS), "no such file")),
    "no such variant": ([f"--config={CONFIGS / 'sft.py'}:tny"], ("sft.py:tny", "tiny and demo")),
    "unknown flag": ([TINY, "--workdirr=x"], ("workdirr", "workdir")),
    "no flag at all": ([TINY, "fast"], ("'fast'", "--")),
    "flag's type": ([TINY, "--profile=maybe"], ("--profile", "maybe")),
    "no such objective": ([TINY, "--config.objective.name=stf"], ("config.objective.name", "'stf'", "'sft'")),
    "mesh": ([TINY, "--config.mesh.data=0"], ("config.mesh", "data=0")),
    "batch": ([TINY, "--config.run.batch_size=5"], ("config.run.batch_size", "5")),
}


def complaint(outcome, *said: str) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("rlhf-jax: ") and outcome.err.endswith("\n") and outcome.err.count("\n") == 1, outcome.err
    for part in said:
        assert part in outcome.err, outcome.err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_sentence(mistake: str, command: Command, tmp_path: pathlib.Path) -> None:
    arguments, said = MISTAKES[mistake]
    # The workdir first: "--config" without a value must stand last.
    complaint(command("train", f"--workdir={tmp_path / 'run'}", *arguments), *said)
    assert not (tmp_path / "run").exists()


def test_no_workdir(command: Command) -> None:
    complaint(command("train", TINY), "--workdir is missing")
    complaint(command("train", TINY, "--workdir="), "--workdir is missing")


def test_no_such_command(command: Command) -> None:
    complaint(command("trian", TINY), "'trian'", "'train'")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("c = 1", "no get_config"),
        ("def get_config(:", "SyntaxError"),
        ("import nowhere", "nowhere"),
        ("def get_config(arg=''):\n    return {'run': 1}", "ConfigDict"),
        ("def get_config(arg=''):\n    raise ValueError('only on Sundays')", "only on Sundays"),
    ],
)
def test_config_file(content: str, said: str, command: Command, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(content)
    complaint(command("train", f"--workdir={tmp_path / 'run'}", f"--config={path}"), str(path), said)
    assert not (tmp_path / "run").exists()


PROCESSES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "key": ([TINY, "--config.optimizer.lrr=1"], ("config.optimizer.lrr", "'lr'")),
    "row": ([TINY, "--config.data.train={rows}"], ("{rows}:2", "completion", "4")),
    "mesh": ([TINY, "--config.mesh.data=3", "--config.mesh.devices=0", "--config.run.batch_size=6"], ("config.mesh", "8 devices")),
}


@pytest.mark.parametrize("mistake", PROCESSES)
def test_in_a_process_of_its_own(mistake: str, tmp_path: pathlib.Path) -> None:
    """What a user's shell gets: nothing but the sentence, warnings of libraries included."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "2 + 2?", "completion": "4"}, {"prompt": "2 + 2?", "completion": 4}])
    arguments, said = PROCESSES[mistake]
    filled = [argument.format(rows=rows) for argument in arguments]
    line = [sys.executable, "-m", "rlhf_jax.cli.main", "train", *filled, f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(ROOT / ".cache")}
    ended = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("rlhf-jax: ") and ended.stderr.count("\n") == 1, ended.stderr
    for part in said:
        assert part.format(rows=rows) in ended.stderr
    assert not (tmp_path / "run").exists()
