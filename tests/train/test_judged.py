"""Judged responses from file to checkpoint: what KTO and a process reward model learn, moments of every kind of reward model, BCO's carry."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from rlhf_jax.data import sample_file
from rlhf_jax.models import Networks
from rlhf_jax.train.assemble import assemble
from rlhf_jax.train.config import check
from rlhf_jax.train.loop import train
from rlhf_jax.train.programs import Programs
from tests.models import tiny as small
from tests.train.runs import outcome, series, steps, tiny

LONG = {"run.steps": 60, "run.batch_size": 16, "run.microbatches": 1, "validation.every": 30, "validation.batches": 0, "checkpoint.every": 0,
        "optimizer.lr": 1e-2}


def test_kto_learns_to_tell_the_thumbs_apart(tmp_path: pathlib.Path) -> None:
    train(tiny("kto", LONG), str(tmp_path))
    accuracy, good, bad = (series(tmp_path, f"eval/reward/{name}") for name in ("accuracy", "chosen", "rejected"))
    assert accuracy[-1] > 0.85 and good[-1] > 0.5 and bad[-1] < -0.5
    kl = series(tmp_path, "objective/kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-4) and series(tmp_path, "reward/baseline")[-1] == pytest.approx(max(0.1 * kl[-1], 0.0), rel=1e-4)


def test_a_process_reward_model_learns_its_verdicts(tmp_path: pathlib.Path) -> None:
    """Wrong steps are a minority: the share of right ones is what a constant would get."""
    labels = [label for line in pathlib.Path(sample_file("stepwise")).read_text().splitlines() for label in json.loads(line)["labels"]]
    train(tiny("process_reward", {**LONG, "run.steps": 100}), str(tmp_path))
    assert series(tmp_path, "eval/reward/step_accuracy")[-1] > max(np.mean(labels) + 0.1, 0.9)


@pytest.mark.parametrize("name", ["plackett_luce", "pointwise", "process_reward"])
def test_moments_are_those_of_every_responses_last_score(name: str) -> None:
    """Row by row and branch by branch: neither filler rows nor the empty branches of a short ranking count."""
    exp = assemble(*check(tiny(name, {"validation.batches": 0, "run.batch_size": 10, "run.microbatches": 1})))
    state = exp.start.state()
    found = Programs(exp).reward_moments(state)
    nets, scores = Networks(state.params, exp.frozen, exp.spec), []
    for batch in exp.valid_data.eval_batches():
        every = np.asarray(small.jit(lambda seqs: nets.reward(seqs).scores)(batch.seqs)).reshape(-1, batch.seqs.tokens.shape[-1])
        segments = batch.seqs.segment_ids.reshape(every.shape)
        scores += [row[np.flatnonzero(segment)[-1]] for row, segment in zip(every, segments) if segment.any()]
    rows = [json.loads(line) for line in pathlib.Path(sample_file(exp.config["data"]["kind"])).read_text().splitlines()]
    assert len(scores) == sum(len(row.get("responses", row.get("scores", [0]))) for row in rows)
    assert found == {"reward_mean": pytest.approx(np.mean(scores), abs=1e-5), "reward_std": pytest.approx(np.std(scores), rel=1e-4)}


def test_bco_goes_on_with_its_running_mean(tmp_path: pathlib.Path) -> None:
    """The carry is in the checkpoint: with the newest one lost, the run ends in the same state, of which it is a part."""
    changes: dict[str, Any] = {"run.steps": 4, "checkpoint.every": 2, "validation.every": 4}
    train(tiny("bco", changes), str(tmp_path))
    before = outcome(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    (tmp_path / "final.json").unlink()
    train(tiny("bco", changes), str(tmp_path))
    assert outcome(tmp_path) == before and steps(tmp_path / "checkpoints") == [2, 4]
