"""Finished runs that several tests start from or compare with, each trained once per session, when first asked for."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from rlhf_jax.train.loop import train
from tests.train.runs import tiny

ONE = {"run.steps": 1, "validation.every": 0}
RUNS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "sft": ("sft", {}),
    "lm": ("lm", {}),
    "reward": ("reward", {}),
    "dpo": ("dpo", {}),
    "ppo": ("ppo", {"log.samples": 8}),
    "grpo": ("grpo", {"log.samples": 8}),
    "wider": ("sft", {**ONE, "model.hidden": 32}),
    "bpe": ("sft", {**ONE, "tokenizer.kind": "bpe", "tokenizer.vocab_size": 264}),
    "reward_unmeasured": ("reward", {**ONE, "data.valid": ""}),  # no validation file: no reward_mean and reward_std in its meta
    "reward_smaller": ("reward", {**ONE, "model.hidden": 8, "model.heads": 1, "run.steps": 2}),
    "reward_bpe": ("reward", {**ONE, "tokenizer.kind": "bpe", "tokenizer.vocab_size": 264, "run.steps": 2}),
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pathlib.Path]:
    """`finished("sft")`: the workdir of that run of RUNS. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")

    def get(name: str) -> pathlib.Path:
        if not (folder / name).exists():
            config, changes = RUNS[name]
            train(tiny(config, changes), str(folder / name))
        return folder / name

    return get
