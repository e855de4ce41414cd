"""What goes with rollouts besides a reward: rows of a second data set (PPO-ptx), or no score at all (on-policy distillation)."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoint, data
from rlhf_jax.train.assemble import assemble
from rlhf_jax.train.config import check
from rlhf_jax.train.loop import train
from rlhf_jax.types import Prompts
from tests.train.runs import metrics, rows, tiny

SHORT = {"validation.every": 0, "log.samples": 8, "checkpoint.every": 1}


def equal(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_rows_of_the_second_data_set_are_a_function_of_seed_and_index() -> None:
    config = tiny("ppo_ptx")
    exp, again = (assemble(*check(config)) for _ in range(2))
    forward = [exp.batch(index) for index in range(4)]
    assert all(equal(again.batch(index), forward[index]) for index in (3, 1, 0))
    assert not equal(forward[0].ptx, forward[1].ptx)
    assert all(isinstance(batch, Prompts) and leaf.shape[0] == 8 for batch in forward for leaf in jax.tree.leaves(batch))
    assert forward[0].ptx.tokens.shape == (8, 64) and forward[0].ptx.segment_ids.max() > 1  # packed
    alone = data.open_dataset("text", config.ptx.train, exp.tokenizer, max_length=64, pack=True, batch_size=8, cache=config.data.cache)
    assert equal(forward[2].ptx, alone.batch(2, seed=config.seed))
    other = assemble(*check(tiny("ppo_ptx", {"seed": 1})))
    assert not equal(other.batch(0).ptx, forward[0].ptx)


def test_responses_alone_are_trained_on_where_the_second_data_set_holds_demonstrations() -> None:
    config = tiny("ppo_ptx", {"ptx.kind": "demo", "ptx.train": data.sample_file("demo"), "ptx.pack": False})
    ptx = assemble(*check(config)).batch(0).ptx
    assert 0 < ptx.loss_mask.sum() < 0.9 * (ptx.segment_ids != 0).sum() and (ptx.segment_ids <= 1).all()


def run(name: str, folder: pathlib.Path, changes: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Any]:
    """(metrics, samples, trained parameters)."""
    train(tiny(name, {**SHORT, "run.steps": 2, **changes}), str(folder))
    return metrics(folder), rows(folder / "samples.jsonl"), checkpoint.load_params(str(folder), key="test")[0]


def close(one: Any, other: Any) -> None:
    """The same samples, metrics and parameters but for rounding."""
    assert one[1] == other[1]
    for a, b in zip(one[0], other[0], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), one[2], other[2])


def test_samples_without_a_score(tmp_path: pathlib.Path) -> None:
    """Validation measures the objective itself, on fresh samples of held-out prompts."""
    lines, samples, _ = run("on_policy_gkd", tmp_path, {"validation.every": 2})
    assert len(samples) == 16 and all(set(row) == {"step", "prompt_id", "messages", "ended", "response"} for row in samples)
    assert lines[0]["loss/on_policy_gkd"] == pytest.approx(0.0, abs=1e-6)  # the teacher is the initial policy
    assert not any("score" in key for line in lines for key in line)
    assert {"eval/loss/on_policy_gkd", "eval/logps/mean", "eval/rollout/length", "eval/rollout/truncated"} == lines[2].keys() - {"step"}


@pytest.mark.slow
def test_without_a_score_fused_equals_staged(finished: Any, tmp_path: pathlib.Path) -> None:
    """A teacher that differs from the student, so that no step is made of rounding."""
    teacher = {"reference_from": str(finished("sft"))}
    close(run("on_policy_gkd", tmp_path / "fused", teacher), run("on_policy_gkd", tmp_path / "staged", {**teacher, "fused": False}))


@pytest.mark.slow
def test_with_a_second_data_set_fused_equals_staged(finished: Any, tmp_path: pathlib.Path) -> None:
    learned = {"reward_fn": "", "reward_from": str(finished("reward")), "reward_normalise": True}
    close(run("ppo_ptx", tmp_path / "fused", learned), run("ppo_ptx", tmp_path / "staged", {**learned, "fused": False}))
