"""Every config of configs/ trains the tiny model: losses are finite, parameters move, and the metric that validation goes by is measured."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest

from rlhf_jax.cli.configs import load_config
from rlhf_jax.train.loop import train
from tests.train.runs import CONFIGS, metrics, tiny

ELSEWHERE = ("sft", "lm", "reward", "dpo", "ppo", "grpo")  # trained by many tests
IN_CI = ("kto", "process_reward", "plackett_luce", "tr_dpo", "gkd", "dapo", "xpo", "ppo_ptx")  # one of each kind of data, network and carry
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in ELSEWHERE)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in NAMES])
def test_tiny_trains(name: str, tmp_path: pathlib.Path) -> None:
    config: Any = tiny(name, {"run.steps": 2, "checkpoint.every": 0})
    result = train(config, str(tmp_path))
    lines = metrics(tmp_path)
    assert result.step == json.loads((tmp_path / "final.json").read_text())["step"] >= 2
    assert all(math.isfinite(float(value)) for line in lines for value in line.values())
    assert max(line.get("optimizer/grad_norm", 0.0) for line in lines) > 0 and any(key.startswith("loss/") for line in lines for key in line)
    assert load_config(str(CONFIGS / f"{name}.py")).validation.metric in {key for line in lines for key in line}


def test_ci_has_one_of_each() -> None:
    assert set(IN_CI) <= set(NAMES)
