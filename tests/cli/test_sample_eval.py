"""`rlhf-jax sample` and `rlhf-jax eval` on a trained run, through the real command line, and their bad inputs."""

import json
import subprocess
import sys

import pytest

from rlhf_jax.data import sample_file
from rlhf_jax.train.loop import train
from tests.train.runs import tiny


def _command(*arguments):
    return subprocess.run([sys.executable, "-m", "rlhf_jax.cli.main", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("sft", "reward"):
        train(tiny(name), str(folder / name))
    return folder


def test_sample_prints_and_writes_completions(runs, tmp_path):
    done = _command("sample", "--checkpoint", str(runs / "sft"), "--prompt", "Sort these digits: 5 3 9 1", "--n", "3", "--max_new_tokens", "8")
    assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "out.jsonl"
    done = _command("sample", "--checkpoint", str(runs / "sft"), "--input", sample_file("prompt"), "--output", str(out), "--n", "2",
                    "--max_new_tokens", "8", "--temperature", "0")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 64 and {row["sample_id"] for row in rows} == {0, 1}
    assert all(a["response"] == b["response"] for a, b in zip(rows[::2], rows[1::2], strict=True)), "greedy samples of a prompt are the same"


def test_eval_of_a_policy_and_of_a_reward_model(runs, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Sort these digits: {i} 3 9"}) + "\n" for i in range(6)))
    out = tmp_path / "row.json"
    done = _command("eval", "--checkpoint", str(runs / "sft"), "--baseline", str(runs / "sft"), "--data", str(prompts), "--gold", "sort",
                    "--samples", "2", "--max_new_tokens", "8", "--output", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(out.read_text())
    assert row["win_vs_baseline"] == 0.5 and abs(row["seq_kl"]) < 1e-4 and 0 <= row["gold_sample"] <= 1
    done = _command("eval", "--checkpoint", str(runs / "reward"), "--data", sample_file("preference"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accuracy" in done.stdout and "length_baseline" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sample",), "--checkpoint is missing"),
        (("sample", "--checkpoint", "x"), "--prompt and --input"),
        (("sample", "--checkpoint", "nowhere", "--prompt", "a"), "nowhere"),
        (("sample", "--checkpoint", "x", "--prompt", "a", "--temperture", "1"), "temperture"),
        (("eval", "--checkpoint", "x"), "--data is missing"),
        (("eval", "--checkpoint", "x", "--data", "nowhere.jsonl"), "no such file"),
        (("evl",), "did you mean 'eval'?"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said):
    done = _command(*arguments)
    assert done.returncode == 2 and said in done.stderr, done.stderr[-1000:]
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
