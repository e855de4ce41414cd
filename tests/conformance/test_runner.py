"""`python -m tests.conformance` passes on both sets that ship, and fails on a wrong number, an unknown case and a file that nobody knows."""

from __future__ import annotations

import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from rlhf_jax import objectives
from tests.conformance import publish, runner
from tests.conformance.__main__ import main
from tests.objectives.settings import CONFIGS

TRL = pathlib.Path(__file__).parent / "vectors" / "trl"
FILES = sorted(path for path in TRL.iterdir() if path.suffix in (".npz", ".json") and path.stem not in runner.DOCUMENTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ours_are_theirs(path):
    lines = runner.run_file(path)
    assert lines and [str(line) for line in lines if line.status == "FAILED"] == []
    assert path.stem == "packing" or all(line.status == "ok" for line in lines)


IN_CI = ("gkd", "plackett_luce", "kto", "pointwise", "xpo", "ppo")  # one of each type of batch; the rest is computed anew in test_against_numpy


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in objectives.names()])
def test_our_own_vectors_are_up_to_date(name):
    path = publish.FOLDER / f"{name}.json"
    lines = runner.run_file(path)
    assert len(lines) == len(publish.CASES) and [str(line) for line in lines if line.status != "ok"] == [], "run python -m tests.conformance.publish"
    stored = json.loads(path.read_text())
    assert stored["equation"] and all(np.isfinite(case["outcome"]["loss"]) for case in stored["cases"])


def test_every_objective_is_published():
    assert {path.stem for path in publish.FOLDER.glob("*.json")} == set(objectives.names()), "run python -m tests.conformance.publish"
    for name in objectives.names():
        stored = json.loads((publish.FOLDER / f"{name}.json").read_text())
        settings = {key: value for key, value in CONFIGS[name].items() if key != "name"}
        assert stored["objective"] == name and stored["hyperparameters"] == settings, "run python -m tests.conformance.publish"


def changed(folder: pathlib.Path, name: str, **arrays) -> pathlib.Path:
    with np.load(TRL / name) as archive:
        np.savez(folder / name, **{**{key: archive[key] for key in archive.files}, **arrays})
    return folder


def test_a_wrong_number_fails(tmp_path, capsys):
    with np.load(TRL / "sft.npz") as archive:
        loss, gradient = archive["loss/nll__nNone"], archive["grad/dft__n37"].copy()
    gradient[0, -1] += 3e-6
    changed(tmp_path, "sft.npz", **{"loss/nll__nNone": loss * (1 + 3e-5), "grad/dft__n37": gradient})
    assert main(["--vectors", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 passed, 2 failed"
    assert [line.split()[1:3] for line in lines[:-1] if line.startswith("FAILED")] == [["sft.npz:", "nll__nNone"], ["sft.npz:", "dft__n37"]]


def test_other_cases_and_values_of_the_same_layout_run(tmp_path, capsys):
    """Options are read off the names: a divisor that no shipped vector has."""
    with np.load(TRL / "sft.npz") as archive:
        changed(tmp_path, "sft.npz", **{"loss/nll__n74": archive["loss/nll__n37"] / 2, "grad/nll__n74": archive["grad/nll__n37"] / 2})
    assert main(["--vectors", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "5 passed, 0 failed"


@pytest.mark.parametrize("key", ["loss/focal", "loss/nll__q3", "speed/nll", "grad/nll__n5"])
def test_a_case_without_a_function_fails(key, tmp_path, capsys):
    changed(tmp_path, "sft.npz", **{key: np.float32(1.0)})
    assert main(["--vectors", str(tmp_path)]) == 1
    assert re.search(rf"FAILED +sft\.npz: {key.removeprefix('loss/')}", capsys.readouterr().out)


def test_a_file_that_nobody_knows_fails(tmp_path, capsys):
    shutil.copy(TRL / "sft.npz", tmp_path / "novel.npz")
    assert main(["--vectors", str(tmp_path)]) == 1
    assert "no function: tests/conformance/cases has no novel.py" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["missing", "."])
def test_a_wrong_folder_is_one_sentence(folder, tmp_path, capsys):
    assert main(["--vectors", str(tmp_path / folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("name", "found"), [
    ("dapo__beta0.04_no_bias_corr", ("dapo", {"beta": "0.04", "no_bias_corr": ""})),
    ("grpo__on_policy_beta1e-3", ("grpo", {"on_policy": "", "beta": "1e-3"})),
    ("simpo__alpha-0.5", ("simpo", {"alpha": "-0.5"})),
    ("kto", ("kto", {})),
])
def test_options(name, found):
    assert runner.options(name, ("beta", "no_bias_corr", "on_policy", "alpha")) == found


def test_comparisons():
    assert runner.Comparison("x", 1.0 + 5e-6, 1.0).error() < 1 < runner.Comparison("x", 1.0 + 2e-5, 1.0).error()
    assert runner.Comparison("x", np.nan, 1.0).error() == runner.Comparison("x", 1.0, np.nan).error() == np.inf
    assert runner.Comparison("x", np.zeros(2), np.zeros(3)).error() == np.inf
    assert runner.slope([1.0, 9.0], [1.0, 0.0], [True, False]).error() == 0.0 and runner.slope([1.0, 9.0], [1.0, 0.0]).error() > 1
