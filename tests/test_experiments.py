"""The experiments on the demo's stages: mistakes in their flags are one sentence, before training; the benchmark compares like with like."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
CALLS = """
import importlib.util, json, sys
from rlhf_jax.cli.main import guarded
spec = importlib.util.spec_from_file_location("experiment", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for flags in json.loads(sys.argv[2]):
    print(guarded("experiment", flags, module.main), file=sys.stderr)
"""


@pytest.mark.parametrize(("name", "own"), [("online", ["--algorithms=grop"]), ("iterative_dpo", [])])
def test_mistakes_are_one_sentence(name: str, own: list[str], tmp_path: pathlib.Path) -> None:
    (tmp_path / "done" / "seed1" / "sort").mkdir(parents=True)
    (tmp_path / "done" / "seed1" / "sort" / "scale.json").write_text("1.0\n")
    new = f"--workdir={tmp_path / 'new'}"
    mistakes = [([new, "--stages=ppo"], "stages"), ([new, "--seed=1"], "seed"), ([new, "--seeds=1,b"], "--seeds = 1,b: must be whole numbers"),
                ([new, "--seeds=1", "--tasks=sort,arithmetik"], "did you mean 'arithmetic'?"),
                ([f"--workdir={tmp_path / 'done'}", "--seeds=1", "--tasks=sort", "--scale=0.5"], "--scale = 0.5: ")]
    mistakes += [([new, "--seeds=1", "--tasks=sort", flag], "did you mean 'grpo'?") for flag in own]
    command = [sys.executable, "-c", CALLS, str(EXPERIMENTS / name / "pipeline.py"), json.dumps([flags for flags, _ in mistakes])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert lines[1::2] == ["2"] * len(mistakes), done.stderr
    for line, (_, said) in zip(lines[::2], mistakes, strict=True):
        assert said in line
    assert not (tmp_path / "new").exists() and len(list((tmp_path / "done").rglob("*"))) == 3, "nothing was written"


def test_a_script_with_fixed_settings_is_no_peer_of_another_setting() -> None:
    """TRL's reads its flags; Tunix's has one beta written in, which is a prefix of another number."""
    code = "import bench, sys; print([bench.honours(text, [f'--beta={b}']) for text in sys.argv[1:] for b in (0.04, 0.0)], bench.honours('', []))"
    scripts = ['GRPOConfig(beta=flag("beta", 0.0))', "GRPOConfig(beta=0.04, epsilon=0.2)"]
    done = subprocess.run([sys.executable, "-c", code, *scripts], capture_output=True, text=True, check=False, cwd=EXPERIMENTS / "benchmarks")
    assert done.stdout.strip() == "[True, True, True, False] True", done.stderr[-500:]
