"""Finished runs that several tests start from or compare with, each trained once per session, when first asked for."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import pytest

from rlhf_jax.train.loop import train
from rlhf_jax.train.programs import Programs
from rlhf_jax.types import Rollout
from tests.train.runs import tiny

ONE = {"run.steps": 1, "validation.every": 0}
# Saved, validated and logged at different steps, so that a stop finds the one ahead of the other.
UNEVEN = {"run.steps": 6, "checkpoint.every": 2, "validation.every": 3, "optimizer.lr": 3e-3}
RUNS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "sft": ("sft", {}),
    "lm": ("lm", {}),
    "reward": ("reward", {}),
    "dpo": ("dpo", {}),
    "ppo": ("ppo", {"log.samples": 8, "reward_fn": "", "reward_from": "@reward", "reward_normalise": True}),  # fused
    "grpo": ("grpo", {"log.samples": 8}),  # a Python reward, the stages apart
    "wider": ("sft", {**ONE, "model.hidden": 32}),
    "bpe": ("sft", {**ONE, "tokenizer.kind": "bpe", "tokenizer.vocab_size": 264}),
    "reward_unmeasured": ("reward", {**ONE, "data.valid": ""}),  # no validation file: no reward_mean and reward_std in its meta
    "reward_smaller": ("reward", {**ONE, "model.hidden": 8, "model.heads": 1, "run.steps": 2}),
    "reward_bpe": ("reward", {**ONE, "model.hidden": 8, "model.heads": 1, "tokenizer.kind": "bpe", "tokenizer.vocab_size": 264, "run.steps": 2}),
}


RUNS["ppo_ptx"] = ("ppo_ptx", RUNS["ppo"][1])
_AHEAD = {"objective.correction": "token_truncate", "schedule.ahead": 2, "schedule.refresh": 4}
RUNS["ahead"] = ("grpo", {**RUNS["grpo"][1], **_AHEAD, "schedule.replay": 0.5, "schedule.capacity": 8})
RUNS["refill"] = ("dapo", {**RUNS["grpo"][1], **_AHEAD, "schedule.ahead": 1, "schedule.refresh": 0, "schedule.refill": 2})
for _name in ("ppo_ptx", "sft", "reward", "dpo", "ppo", "grpo", "ahead", "refill"):
    _config, _changes = RUNS[_name]
    RUNS[f"uneven_{_name}"] = (_config, {**UNEVEN, **_changes})


def command(name: str, finished: Callable[[str], pathlib.Path]) -> tuple[str, dict[str, Any]]:
    """(config, changes) of a run; "@reward" stands for the workdir of that run."""
    config, changes = RUNS[name]
    is_run = lambda value: isinstance(value, str) and value.startswith("@")  # noqa: E731
    return config, {key: str(finished(value[1:])) if is_run(value) else value for key, value in changes.items()}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pathlib.Path]:
    """`finished("sft")`: the workdir of that run of RUNS. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")

    def get(name: str) -> pathlib.Path:
        if not (folder / name).exists():
            config, changes = command(name, get)
            train(tiny(config, changes), str(folder / name))
        return folder / name

    return get


@pytest.fixture
def rollouts(monkeypatch: pytest.MonkeyPatch) -> list[Rollout]:
    """Every rollout that a run advances by, without earlier rows."""
    seen: list[Rollout] = []
    advance = Programs.advance

    def record(self: Programs, state: Any, batches: Any) -> Any:
        found = advance(self, state, batches)
        seen.append(jax.device_get(found[2]))
        return found

    monkeypatch.setattr(Programs, "advance", record)
    return seen
