"""Rewards through `train`: each failure policy, several rewards at once, networks among them, what is logged, and runs that go on bit-exact."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import Networks, NetworkSpec
from rlhf_jax.ops import masking
from rlhf_jax.rewards import learned, rules
from rlhf_jax.saved import load_source
from rlhf_jax.train import rewarding, rollouts, schedule
from rlhf_jax.train.loop import train
from rlhf_jax.train.programs import Programs
from tests.train.runs import metrics, outcome, rows, series, tiny

SHORT = {"run.steps": 2, "validation.every": 0, "log.samples": 8, "checkpoint.every": 1}
MODULE = '''
import json, time
from rlhf_jax.rewards.host import Failed

def length(prompts, responses, references):
    return [len(r) / 8 for r in responses]

def nan_on_even(prompts, responses, references):
    """Every prompt has rows of both kinds, so that what is left of a group still differs."""
    return [float("nan") if n % 4 == 0 else Failed("odd") if n % 4 == 1 else sum(map(ord, r)) % 97 for n, r in enumerate(responses)]

def raises(prompts, responses, references):
    raise ConnectionError("the verifier is down")

def hangs(prompts, responses, references):
    while True:
        pass

def short(prompts, responses, references):
    return [0.5]
'''


@pytest.fixture(autouse=True)
def module(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user's module of rewards."""
    folder = tmp_path / "importable"
    folder.mkdir()
    (folder / "failing_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("failing_rewards", None)


def run(name: str, folder: pathlib.Path, changes: dict[str, Any]) -> Any:
    return train(tiny(name, {**SHORT, **changes}), str(folder))


def failing(function: str, policy: str, **more: Any) -> dict[str, Any]:
    return {"reward_fn": f"failing_rewards.{function}", "reward_failure.policy": policy, **{f"reward_failure.{k}": v for k, v in more.items()}}


@pytest.mark.parametrize("function", ["nan_on_even", "raises", "hangs", "short"])
def test_raise_ends_the_run_with_a_sentence(function: str, tmp_path: pathlib.Path) -> None:
    said = {"nan_on_even": "got nan for sample 0", "raises": "ConnectionError: the verifier is down", "hangs": "longer than 0.3 s",
            "short": "expected 8 rewards"}
    with pytest.raises(UserError, match=said[function]) as caught:
        run("grpo", tmp_path / "run", {"run.steps": 1, **failing(function, "raise", timeout=0.3 if function == "hangs" else 0.0)})
    assert str(caught.value).startswith("config.reward_fn") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_mask_leaves_rows_out(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN and a reason hit their rows alone: those have no score and are not trained on, the others are, and the update is finite."""
    seen: list[Any] = []
    advance = Programs.advance
    monkeypatch.setattr(Programs, "advance", lambda self, state, batch: seen.append(advance(self, state, batch)) or seen[-1])
    run(name, tmp_path / "run", {**failing("nan_on_even", "mask"), "run.steps": 1})
    (line,) = metrics(tmp_path / "run")
    assert line["reward/failed"] == line["rollout/unscored"] == 0.5
    assert all(math.isfinite(float(value)) for value in line.values()) and line["optimizer/grad_norm"] > 0 and line["optimizer/skipped"] == 0
    scores = np.asarray(seen[0][2].scores)
    assert np.isnan(scores).tolist() == [n % 4 < 2 for n in range(8)]
    sampled = rows(tmp_path / "run" / "samples.jsonl")
    assert [row["score"] is None for row in sampled] == [n % 4 < 2 for n in range(8)]
    assert [row.get("failed") for row in sampled[:4]] == [{"score": "returned nan"}, {"score": "odd"}, None, None]
    known = [row["score"] for row in sampled if row["score"] is not None]
    assert line["objective/score"] == pytest.approx(np.mean(known), abs=1e-5)


@pytest.mark.parametrize(
    ("function", "said"), [("raises", "raised ConnectionError"), ("hangs", "raised TimeoutError"), ("short", "returned 1 rewards for 8")]
)
def test_mask_of_a_whole_call(function: str, said: str, tmp_path: pathlib.Path) -> None:
    """Nothing is left to train on: the gradient is zero, the run goes on, and each sample is in the log though none was asked for."""
    changes = failing(function, "mask", timeout=0.3 if function == "hangs" else 0.0)
    run("grpo", tmp_path / "run", {**changes, "log.samples": 0, "objective.beta": 0.0})
    assert series(tmp_path / "run", "reward/failed") == [1.0, 1.0] == series(tmp_path / "run", "rollout/unscored")
    assert series(tmp_path / "run", "optimizer/grad_norm") == [0.0, 0.0]
    sampled = rows(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in sampled] == [1] * 8 + [2] * 8
    assert all(row["failed"]["score"].startswith(said) and row["messages"] and "row" not in row for row in sampled)


def test_default_takes_their_place(tmp_path: pathlib.Path) -> None:
    run("grpo", tmp_path / "run", {**failing("nan_on_even", "default", default=-2.0), "run.steps": 1})
    (line,) = metrics(tmp_path / "run")
    sampled = rows(tmp_path / "run" / "samples.jsonl")
    assert line["reward/failed"] == 0.5 and line["rollout/unscored"] == 0.0
    assert [row["score"] == -2.0 for row in sampled] == [n % 4 < 2 for n in range(8)] and "failed" in sampled[0] and "failed" not in sampled[2]
    assert line["objective/score"] == pytest.approx(np.mean([row["score"] for row in sampled]), abs=1e-5)


def test_the_log_of_failures_is_bounded(tmp_path: pathlib.Path) -> None:
    failures = [{"row": n, "prompt_id": 0, "failed": {"a": "why"}} for n in range(100)]
    found = rewarding.failed_samples(failures, [{"prompt_id": 0}, {"prompt_id": 0}], np.array([np.nan, 1.0]))
    assert len(found) == rewarding.LOGGED and found[0]["score"] is None and json.loads(json.dumps(found))


def test_a_failure_of_a_refilled_batch_is_of_no_row_of_it() -> None:
    """Row 1 of a round is not row 1 of the batch: the sample is logged beside it, as failed, and the batch's own row is not."""
    rewards = types.SimpleNamespace(measure=lambda *_, **__: ("rolled", {}), failures=[{"row": 1, "prompt_id": 7, "failed": {"a": "why"}}])
    online = types.SimpleNamespace(_rewards=rewards, _exp=types.SimpleNamespace(train_data=None), _plan=schedule.Schedule(refill=2), failures=[],
                                   frozen=lambda state: {})
    for _ in range(2):
        rollouts.Rollouts._scored(online, None, None, None)  # type: ignore[arg-type]
    found = rewarding.failed_samples(online.failures, [{"prompt_id": 0}, {"prompt_id": 1}], np.array([0.5, 1.0]))
    assert found == [{"prompt_id": 0, "score": 0.5}, {"prompt_id": 1, "score": 1.0}] + [{"prompt_id": 7, "failed": {"a": "why"}}] * 2


@pytest.mark.parametrize(("policy", "fused"), [("raise", True), ("default", False)])
def test_a_network_that_gives_nan_meets_the_policy(
    policy: str, fused: bool, finished: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by a metric an iteration late: counted, its samples logged though none were asked for; before another checkpoint is written."""
    changes = {"reward_fn": "", "reward_from": str(finished("reward")), "reward_failure.policy": policy, "reward_failure.default": -2.0,
               "fused": fused, "log.samples": 0, "run.steps": 3, "checkpoint.every": 3}
    given = learned.score
    monkeypatch.setattr(learned, "score", lambda nets, rollout: jnp.where(jnp.arange(8) % 4 == 1, jnp.nan, given(nets, rollout)))
    if policy == "raise":
        with pytest.raises(UserError, match=r"config.reward_failure.policy = 'raise': a reward network gave 0.25 of the samples no finite number"):
            run("grpo", tmp_path / "run", changes)
        assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    else:
        run("grpo", tmp_path / "run", changes)
        assert series(tmp_path / "run", "rollout/unscored") == [0.0] * 3 and series(tmp_path / "run", "optimizer/skipped") == [0.0] * 3
    done = 1 if policy == "raise" else 3
    assert series(tmp_path / "run", "reward/failed")[:done] == [0.25] * done
    sampled = rows(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in sampled] == [step for step in range(1, done + 1) for _ in range(2)]
    assert all(row["failed"] == {"score": "gave nan"} and row["messages"] for row in sampled)


@pytest.mark.slow
def test_a_run_with_failures_resumes_bit_exact(tmp_path: pathlib.Path) -> None:
    changes = {**failing("nan_on_even", "mask"), "run.steps": 3, "validation.every": 1}
    run("grpo", tmp_path / "run", {**changes, "log.samples": 2})
    whole = outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    (tmp_path / "run" / "final.json").unlink()
    run("grpo", tmp_path / "run", {**changes, "log.samples": 2})
    assert outcome(tmp_path / "run") == whole
    assert all(math.isfinite(value) for value in series(tmp_path / "run", "eval/objective/score"))


# --- several rewards ---


def test_the_example_trains(tmp_path: pathlib.Path) -> None:
    """configs/grpo_rules.py: the score of each sample is the weighted sum of the rules on its text."""
    config = tiny("grpo_rules", {**SHORT})
    train(config, str(tmp_path / "run"))
    sampled = rows(tmp_path / "run" / "samples.jsonl")
    texts = [row["response"] for row in sampled]
    letter = rules.regex([[]] * 16, texts, [None] * 16, pattern="[a-z]")
    short = [min(value, 0.9) for value in rules.length([[]] * 16, texts, [None] * 16, high=4, slack=8)]
    expected = [0.5 * a + b for a, b in zip(letter, short, strict=True)]
    assert [row["score"] for row in sampled] == pytest.approx(expected, abs=1e-5) and len(set(expected)) > 1
    for step, line in enumerate(metrics(tmp_path / "run")):
        assert line["reward/regex"] == pytest.approx(np.mean(letter[8 * step : 8 * step + 8]), abs=1e-5)
        assert line["objective/score"] == pytest.approx(np.mean(expected[8 * step : 8 * step + 8]), abs=1e-5) and line["reward/failed"] == 0.0


def scored_directly(runs: dict[str, pathlib.Path], seqs: Any) -> np.ndarray:
    """[B, 2]: a reward model's score, and log π_run − log π_reference summed over the response, straight from the checkpoints."""
    opened = {name: load_source(str(path), "test") for name, path in runs.items()}
    seqs = jax.tree.map(jnp.asarray, seqs)
    reward = Networks({}, {"reward": opened["reward"].params}, NetworkSpec(reward=opened["reward"].config)).reward(seqs).scores
    logps = [Networks({}, {"ref": opened[name].params}, NetworkSpec(ref=opened[name].config)).ref(seqs).logps for name in ("run", "reference")]
    return np.stack([np.asarray(masking.at_last_real(reward, seqs.segment_ids)), np.asarray(((logps[0] - logps[1]) * seqs.loss_mask).sum(-1))], -1)


@pytest.mark.parametrize(("fused", "with_rule"), [(True, False), (False, False), (False, True)])
def test_networks_and_rules_together(fused: bool, with_rule: bool, finished: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model and DPO's implicit reward read the rollout's own tokens, in one program where no rule needs the text."""
    seen: list[Any] = []
    advance = Programs.advance
    monkeypatch.setattr(Programs, "advance", lambda self, state, batch: _kept(seen, advance(self, state, batch)))
    runs = {"reward": finished("reward"), "run": finished("dpo"), "reference": finished("sft")}
    seen.clear()
    rewards: tuple[dict[str, Any], ...] = (
        {"name": "learned", "run": str(runs["reward"]), "weight": 2.0},
        {"name": "implicit", "run": str(runs["run"]), "reference": str(runs["reference"]), "beta": 0.5, "label": "dpo", "clip": (-1.0, 1.0)},
    )
    if with_rule:
        rewards = ({"name": "rules.brevity", "weight": 3.0}, *rewards)
    run("grpo", tmp_path / "run", {"run.steps": 1, "reward_fn": "", "rewards": rewards, "fused": fused})
    (rolled,) = seen
    direct = scored_directly(runs, rolled.seqs)
    expected = 2.0 * direct[:, 0] + np.clip(0.5 * direct[:, 1], -1, 1)
    (line,) = metrics(tmp_path / "run")
    if with_rule:
        texts = [row["response"] for row in rows(tmp_path / "run" / "samples.jsonl")]
        expected += 3.0 * np.asarray(rules.brevity([], texts, []))
    np.testing.assert_allclose(rolled.scores, expected, rtol=1e-4, atol=1e-5)
    assert np.std(direct[:, 0]) > 0 and np.std(direct[:, 1]) > 0
    assert line["reward/learned"] == pytest.approx(direct[:, 0].mean(), abs=1e-4)
    assert line["reward/dpo"] == pytest.approx(0.5 * direct[:, 1].mean(), abs=1e-4)
    assert line["reward/failed"] == 0.0 and ("reward/brevity" in line) == with_rule
    for number, row in enumerate(rows(tmp_path / "run" / "samples.jsonl")):
        assert list(row["rewards"]) == (["brevity"] if with_rule else []) + ["learned", "dpo"]
        assert [row["rewards"]["learned"], row["rewards"]["dpo"]] == pytest.approx([direct[number, 0], 0.5 * direct[number, 1]], abs=1e-4)


def _kept(seen: list[Any], found: Any) -> Any:
    seen.append(jax.device_get(found[2]))
    return found


def test_a_reward_model_with_another_tokenizer_is_one_of_them(finished: Any, tmp_path: pathlib.Path) -> None:
    """It reads the text, and gives what it gives alone; its stored moments normalise it."""
    source = str(finished("reward_bpe"))
    alone = {"run.steps": 1, "reward_fn": "", "reward_from": source, "reward_normalise": True}
    run("grpo", tmp_path / "alone", alone)
    rewards = ({"name": "learned", "run": source, "normalise": "stored", "weight": 0.5}, {"name": "rules.brevity", "weight": 0.0})
    run("grpo", tmp_path / "both", {"run.steps": 1, "reward_fn": "", "rewards": rewards})
    first, second = ([row["score"] for row in rows(tmp_path / name / "samples.jsonl")] for name in ("alone", "both"))
    assert second == pytest.approx([0.5 * score for score in first], abs=1e-4)


MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a policy as the reward model": ({"name": "learned", "run": "@sft"}, ("config.rewards[0].run", "policy checkpoint")),
    "a reward model as the policy": (
        {"name": "implicit", "run": "@reward", "reference": "@sft", "beta": 0.1}, ("config.rewards[0].run", "reward checkpoint")),
    "another tokenizer": (
        {"name": "implicit", "run": "@dpo", "reference": "@bpe", "beta": 0.1}, ("config.rewards[0].reference", "another tokenizer")),
    "no moments": ({"name": "learned", "run": "@reward_unmeasured", "normalise": "stored"}, ("config.rewards[0].run", "reward_mean")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_networks_that_do_not_fit(mistake: str, finished: Any, tmp_path: pathlib.Path) -> None:
    entry, said = MISTAKES[mistake]
    entry = {key: str(finished(value[1:])) if isinstance(value, str) and value.startswith("@") else value for key, value in entry.items()}
    with pytest.raises(UserError) as caught:
        run("grpo", tmp_path / "run", {"reward_fn": "", "rewards": (entry,)})
    assert all(part in str(caught.value) for part in said) and not (tmp_path / "run").exists()
