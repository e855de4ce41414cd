"""Transformers that learn through the whole loop: from pairs, on pairs held out, and from their own samples. (Judged responses: test_judged.py.)"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from rlhf_jax.data import sample_file
from rlhf_jax.train.loop import train
from tests.train.runs import series, tiny, write_rows

LONG = {"run.steps": 30, "run.microbatches": 1, "validation.every": 30, "validation.batches": 0, "checkpoint.every": 0, "optimizer.lr": 1e-2}


def pairs(folder: pathlib.Path, *, swapped: bool) -> dict[str, Any]:
    """The shipped pairs in two files, every fourth one held out, with the branches exchanged if `swapped`."""
    rows = [json.loads(line) for line in pathlib.Path(sample_file("preference")).read_text().splitlines()]
    if swapped:
        rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    held_out = write_rows(folder / "held_out.jsonl", rows[::4])
    kept = write_rows(folder / "pairs.jsonl", [row for index, row in enumerate(rows) if index % 4])
    return {**LONG, "run.batch_size": 16, "data.train": kept, "data.valid": held_out}


def test_dpo_turns_its_preference_round(tmp_path: pathlib.Path) -> None:
    """This seed's fresh policy finds most of the shipped chosen responses likelier than the rejected ones, so it is taught the opposite."""
    train(tiny("dpo", pairs(tmp_path, swapped=True)), str(tmp_path / "run"))
    run = tmp_path / "run"
    accuracy, margin = series(run, "logps/accuracy"), series(run, "reward/margin")
    assert accuracy[0] < 0.4 and abs(margin[0]) < 1e-4
    assert np.mean(accuracy[-5:]) > 0.9 and np.mean(margin[-5:]) > 1.0
    for name in ("eval/logps/accuracy", "eval/reward/accuracy"):
        assert series(run, name)[-1] >= 0.9


def test_a_reward_model_learns_the_order_of_pairs(tmp_path: pathlib.Path) -> None:
    train(tiny("reward", pairs(tmp_path, swapped=False)), str(tmp_path / "run"))
    accuracy = series(tmp_path / "run", "reward/accuracy")
    assert accuracy[0] < 0.6 and np.mean(accuracy[-5:]) > 0.85
    assert series(tmp_path / "run", "eval/reward/accuracy")[-1] >= 0.9


def test_grpo_raises_the_score_of_its_samples(tmp_path: pathlib.Path) -> None:
    """The score is brevity's: 0.67 for eight characters, 1 for none."""
    train(tiny("grpo", {**LONG, "run.batch_size": 64, "sampling.group_size": 8}), str(tmp_path))
    score = series(tmp_path, "objective/score")
    assert np.mean(score[:2]) < 0.75 and np.mean(score[-5:]) > 0.9
    assert series(tmp_path, "eval/objective/score")[-1] > 0.9
    kl = series(tmp_path, "objective/kl")
    assert kl[0] < 1e-3 and kl[-1] > 1.0
