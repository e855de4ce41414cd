"""experiments/envs/pipeline.py: from flawed demonstrations to a policy that calls its tool and halves; and its mistakes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

PIPELINE = pathlib.Path(__file__).parents[1] / "experiments" / "envs" / "pipeline.py"


def experiment(workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PIPELINE), f"--workdir={workdir}", *flags], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "gain", "reached"), [("calculator", 0.3, 0.65), ("guess", 0.25, 0.8)])
def test_grpo_improves_on_flawed_demonstrations(task: str, gain: float, reached: float, tmp_path: pathlib.Path) -> None:
    """Most demonstrations answer out of the head, or count up; all that teaches otherwise is the score of whole episodes."""
    done = experiment(tmp_path, f"--tasks={task}", "--seeds=0")
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads((tmp_path / "results.json").read_text())[task]
    before, after = (found[stage]["eval/objective/score"] for stage in ("sft", "grpo"))
    assert after > reached and after - before > gain, (before, after)
    scores = found["curve"]["scores"]
    assert sum(scores[-5:]) / 5 - sum(scores[:2]) / 2 > gain
    assert found["grpo"]["eval/rollout/truncated"] < 0.2 and task in done.stdout
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_mistakes_are_one_sentence(tmp_path: pathlib.Path) -> None:
    for flag, said in (("--tasks=gues", "did you mean 'guess'?"), ("--seeds=a", "whole numbers")):
        done = experiment(tmp_path / "x", flag)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_results_of_another_scale_are_not_taken(tmp_path: pathlib.Path) -> None:
    (tmp_path / "guess_1").mkdir()
    (tmp_path / "guess_1" / "result.json").write_text('{"scale": 0.1}')
    done = experiment(tmp_path, "--tasks=guess", "--seeds=0,1")
    assert done.returncode == 2 and "--scale = 1: " in done.stderr and "--scale=0.1; choose another --workdir" in done.stderr
    assert not (tmp_path / "guess_0").exists(), "found before the first seed was trained"
