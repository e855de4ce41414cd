"""Made-up results and metrics for the report's tests: two tasks, every stage, samples that hold markup."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np

from rlhf_jax.report.results import POLICY_STAGES

_GOLD = {"sft": 0.52, "dpo": 0.81, "ppo": 0.86, "grpo": 0.9, "grpo_gold": 0.97}


def policy(gold: float, win: float | None, kl: float, seconds: float) -> dict:
    """One policy stage's entry."""
    interval = None if win is None else [max(0.0, win - 0.04), min(1.0, win + 0.04)]
    entry = {
        "gold_greedy": gold,
        "gold_sample": gold - 0.05,
        "gold_greedy_ci95": [gold - 0.02, min(1.0, gold + 0.02)],
        "gold_sample_ci95": [gold - 0.07, gold - 0.03],
        "win_vs_sft": win,
        "win_ci95": interval,
        "seq_kl": kl,
    }
    final = {name: value for name, value in entry.items() if not name.endswith("greedy_ci95")}
    final |= {"gold_sample": gold - 0.12, "gold_greedy": gold - 0.1, "seq_kl": kl * 1.6}
    return entry | {"seconds": seconds} | ({} if win is None else {"final": final})


def results(hostile: str = "<script>alert(1)</script>") -> dict:
    """A valid document."""
    tasks = {}
    for shift, task in ((0.0, "sort"), (-0.07, "arithmetic")):
        stages: dict = {
            stage: policy(_GOLD[stage] + shift, None if stage == "sft" else _GOLD[stage] - 0.08, 3.0 * i, 20.0 + 7 * i)
            for i, stage in enumerate(_GOLD)
        }
        stages["rm"] = {"accuracy": 0.913, "length_baseline": 0.562, "seconds": 14.2}
        stages["samples"] = [_sample(task, index, hostile) for index in range(4)]
        tasks[task] = stages
    versions = {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8", "orbax": "0.12.8"}
    return {
        "tasks": tasks,
        "versions": versions | {"platform": "Linux x86_64", "device": "cpu"},
        "configs": {"sort/sft": {"optimizer": {"lr": 1e-3}, "seed": 0}, "sort/dpo": "objective:\n  name: dpo\n  beta: 0.1\n"},
    }


def write_metrics(workdir: pathlib.Path, stage: str, steps: int = 200) -> pathlib.Path:
    """A metrics.jsonl as a run of that stage would leave it."""
    workdir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(stage))
    lines = []
    for step in range(1, steps + 1):
        decay = math.exp(-step / 60)
        record = {"step": step, f"loss/{stage}": 0.3 + decay + 0.05 * rng.normal(), "grad_norm": 1 + 0.2 * rng.normal()}
        if stage in ("rm", "dpo"):
            record |= {"reward/accuracy": 1 - 0.5 * decay + 0.03 * rng.normal(), "reward/margin": 2 - 2 * decay + 0.1 * rng.normal()}
        if stage in ("ppo", "grpo", "grpo_gold"):
            record |= {"objective/scores": 3 - 3 * decay + 0.2 * rng.normal(), "objective/kl": 8 - 8 * decay, "policy/entropy": 0.2 + decay}
        if step % 25 == 0:
            record["valid/loss"] = 0.35 + decay
        lines.append(json.dumps(record))
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return workdir


def _sample(task: str, index: int, hostile: str) -> dict:
    prompt, answer = ("Sort these digits: 5 3 9 1", "1 3 5 9") if task == "sort" else ("What is 7 + 5?", "<answer>12</answer>")
    first = hostile if index == 0 else "9 5 3 1" if task == "sort" else "<result>12</result>"
    answers = {stage: {"response": answer, "gold": 0.717 if index == 2 else 1.0} for stage in POLICY_STAGES}
    return {"prompt": prompt, **answers, "sft": {"response": first, "gold": 0.3}}
