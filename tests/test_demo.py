"""The demo's pipeline end to end at a small scale: every stage, the results' schema, the report, and a second run that does nothing anew."""

import json
import pathlib
import subprocess
import sys

import pytest

from rlhf_jax.report.results import STAGES, read_results

PIPELINE = pathlib.Path(__file__).parents[1] / "experiments" / "demo" / "pipeline.py"


def _demo(workdir, *flags):
    return subprocess.run([sys.executable, str(PIPELINE), f"--workdir={workdir}", *flags], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo")
    done = _demo(workdir, "--tasks=sort", "--scale=0.1")
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir, done.stdout


def test_results_hold_every_stage_and_the_report_stands_alone(demo):
    workdir, printed = demo
    results = read_results(workdir / "results.json")
    stages = results["tasks"]["sort"]
    assert set(STAGES) <= set(stages)
    assert 0.0 <= stages["rm"]["accuracy"] <= 1.0
    assert all(set(stages[stage]["final"]) >= {"gold_greedy", "gold_sample", "win_vs_sft", "win_ci95", "seq_kl"} for stage in ("dpo", "ppo", "grpo"))
    assert abs(stages["sft"]["seq_kl"]) < 1e-3, "SFT against itself"
    assert "GRPO on gold" in printed and "report.html" in printed
    page = (workdir / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_splits_are_disjoint_and_pairs_hold_no_gold(demo):
    workdir, _ = demo
    folder = workdir / "sort"
    contents = []
    for name in ("sft_train", "sft_valid", "rm_prompts", "rl_prompts", "valid_prompts", "test_prompts"):
        rows = [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]
        prompts = [row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows]
        contents.append({tuple(sorted(prompt.split(": ")[1].split())) for prompt in prompts})
    for i, left in enumerate(contents):
        for right in contents[i + 1 :]:
            assert not left & right
    assert "gold" not in (folder / "pairs" / "train.jsonl").read_text()


def test_a_second_run_trains_nothing_and_finds_the_same(demo):
    workdir, _ = demo
    before = json.loads((workdir / "results.json").read_text())["tasks"]
    stamps = {path: path.stat().st_mtime_ns for path in workdir.rglob("checkpoints/*/params")}
    done = _demo(workdir, "--tasks=sort", "--scale=0.1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((workdir / "results.json").read_text())["tasks"] == before
    assert stamps == {path: path.stat().st_mtime_ns for path in workdir.rglob("checkpoints/*/params")}


def test_a_wrong_task_is_one_sentence(tmp_path):
    done = _demo(tmp_path / "x", "--tasks=srot")
    assert done.returncode == 2 and "did you mean 'sort'?" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x" / "results.json").exists()
