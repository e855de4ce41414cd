"""Slices by name, and whole runs compiled for them by the TPU's own compiler, which is in the extra that `make test` installs."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from rlhf_jax.compile.chips import CHIPS, prepare
from rlhf_jax.errors import UserError
from rlhf_jax.launch.topologies import GENERATIONS, parse
from tests.train.runs import CONFIGS, ROOT, SMALL

GIB = 2**30


def test_every_generation_that_is_launched_has_its_chip() -> None:
    assert CHIPS.keys() == GENERATIONS.keys()
    assert CHIPS["v5p"].hbm == 95 * GIB and CHIPS["v5e"].hbm == 16 * GIB


def test_without_the_compiler_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlhf-jax\[compile\]'"):
        prepare(parse("v5e:4x4"))


def compiled(folder: pathlib.Path, *arguments: str) -> tuple[int, dict, str]:
    """`rlhf-jax compile` in a process of its own: its exit code, JSON and standard error."""
    pytest.importorskip("libtpu")
    path = folder / "plan.json"
    command = [sys.executable, "-m", "rlhf_jax.cli.main", "compile", *arguments, f"--json={path}", f"--picture={folder / 'plan.svg'}", "--nocache"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, json.loads(path.read_text()) if path.exists() else {}, done.stderr


def test_a_whole_iteration_of_grpo_for_a_tpu(tmp_path: pathlib.Path) -> None:
    sizes = [f"--config.model.{key}={value}" for key, value in SMALL.items()]
    code, plan, said = compiled(
        tmp_path, f"--config={CONFIGS / 'grpo'}.py:tiny", "--topology=v5e:2x2", "--config.mesh.devices=0", "--config.mesh.fsdp=4",
        "--config.reward_fn=", "--config.reward_from=nowhere", "--config.run.microbatches=1", "--programs=iteration", *sizes)
    assert code == 0, said
    program = plan["programs"]["iteration"]
    assert plan["fits"] and program["fits"] and plan["chips"] == 4 and "nowhere" in plan["notes"][0]
    assert 0 < program["args_bytes"] + program["temp_bytes"] <= program["peak_bytes"] < 16 * GIB
    assert {tuple(row["axes"]) for row in program["collectives"]} == {("fsdp",)} and program["lower_bound_seconds"] > 0
    assert program["flops"] >= program["model_flops"] > 0
    assert (tmp_path / "plan.svg").read_text().count("<svg") == 1


def test_llama_3_8b_at_4k_for_v5p(tmp_path: pathlib.Path) -> None:
    """The shape of configs/llama3_8b_sft.py with four of its layers, which are one loop however many there are."""
    code, plan, said = compiled(tmp_path, f"--config={CONFIGS / 'llama3_8b_sft'}.py", "--topology=v5p:4x4x4", "--programs=step",
                                "--config.model.layers=4")
    assert code == 0, said
    step = plan["programs"]["step"]
    assert plan["fits"] and plan["mesh"]["fsdp"] == 16
    gathered = sum(row["bytes"] for row in step["collectives"] if row["kind"] == "all-gather")
    assert gathered > 0
    table = 128_256 * 4096 * 2  # bytes of the output matrix, which no chip gathers, let alone once a chunk
    assert max(row["bytes"] / max(row["runs"], 1) for row in step["collectives"]) < table


def test_what_does_not_fit_is_said_with_the_compilers_own_list(tmp_path: pathlib.Path) -> None:
    sizes = dict(hidden=4096, layers=2, heads=32, kv_heads=8, head_dim=128, mlp=14_336, vocab_size=128_256)
    code, plan, said = compiled(
        tmp_path, f"--config={CONFIGS / 'sft'}.py:tiny", "--topology=v5e:2x2", "--programs=step", "--config.mesh.devices=0", "--config.mesh.data=4",
        "--config.run.microbatches=1",
        *(f"--config.model.{key}={value}" for key, value in sizes.items()), "--config.model.compute_dtype=bfloat16")
    assert code == 3 and not plan["fits"] and plan["margin_bytes"] < 0
    assert plan["programs"]["step"]["peak_bytes"] > 24 * GIB  # 16.6 of parameters and moments, and what the compiler wanted besides
    assert "--search" in said
