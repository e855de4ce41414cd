"""Episodes of several turns through `train`: log-probs as the trainer reads them, draws that do not depend on how turns are batched, resume, devices,
failures, and policies that learn."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import envs
from rlhf_jax.envs import Step
from rlhf_jax.envs.guess import Guess
from rlhf_jax.errors import UserError
from rlhf_jax.models import Networks
from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.train.assemble import assemble
from rlhf_jax.train.config import check
from rlhf_jax.train.loop import Result, train
from rlhf_jax.train.programs import Programs
from rlhf_jax.types import Rollout
from tests.models.tiny import uncached
from tests.train import test_bad_input
from tests.train.conftest import UNEVEN
from tests.train.killed import POINTS
from tests.train.runs import metrics, rows, series, tiny
from tests.train.test_resume import crash, same_end

SHORT = {"run.steps": 2, "validation.every": 0, "log.samples": 8, "checkpoint.every": 1, "run.microbatches": 1}
PLAYED = ("tokens", "positions", "segment_ids", "loss_mask", "loss_positions")


def run(name: str, folder: pathlib.Path, changes: dict[str, Any]) -> Result:
    return train(tiny(name, {**SHORT, **changes}), str(folder))


# --- the rollout ---


@functools.cache
def opened(changes: tuple[tuple[str, Any], ...] = ()) -> tuple[Any, Programs, Any]:
    """An assembled guessing run, its programs and its first state."""
    config = tiny("grpo_guess", {**SHORT, "run.batch_size": 16, **dict(changes)})
    exp = assemble(*check(config))
    return exp, Programs(exp), exp.start.state()


def played(index: int = 0, **changes: Any) -> Rollout:
    exp, programs, state = opened(tuple(changes.items()))
    batch = jax.tree.map(jax.numpy.asarray, exp.batch(index))
    rolled, _ = programs._episodes.play(state.params, exp.frozen, batch, state.key, jax.numpy.int32(index), exp.train_data)  # type: ignore[union-attr]
    return jax.device_get(rolled)


def turns(rolled: Rollout) -> np.ndarray:
    """[B], runs of own tokens."""
    mask = np.pad(rolled.seqs.loss_mask, ((0, 0), (1, 0)))
    return (~mask[:, :-1] & mask[:, 1:]).sum(-1)


def test_log_probs_are_the_trainers() -> None:
    """Per token, over all turns: plain log-probs as the trainer reads the whole row, with the head at `loss_positions` alone or everywhere."""
    exp, _, state = opened()
    rolled = played()
    assert (turns(rolled) > 1).sum() >= 4 and turns(rolled).max() == 3  # else there is nothing to see
    read = jax.jit(lambda params, seqs: Networks(params, exp.frozen, exp.spec).policy(seqs).logps)
    assert rolled.seqs.prefix == (4, 32)
    for seqs in (rolled.seqs, rolled.seqs.replace(loss_positions=None), rolled.seqs.replace(prefix=None)):
        logps = np.asarray(read(state.params, jax.tree.map(jax.numpy.asarray, seqs)))
        gap = np.abs(logps - rolled.plain_logps)[rolled.seqs.loss_mask]
        assert gap.max() < 1e-4 and len(gap) > 40
    assert (rolled.sampler_logps[rolled.seqs.loss_mask] > rolled.plain_logps[rolled.seqs.loss_mask]).all()  # the filters leave eleven tokens
    assert not rolled.plain_logps[~rolled.seqs.loss_mask].any()


@pytest.mark.parametrize("changes", [{"env.halvings": 0}, {"env.halvings": 4, "env.widths": 3}])
def test_draws_do_not_depend_on_how_turns_are_batched(changes: dict[str, Any]) -> None:
    for index in (0, 1):
        one, other = played(index), played(index, **changes)
        for name in PLAYED:
            assert np.array_equal(getattr(one.seqs, name), getattr(other.seqs, name)), name
        np.testing.assert_allclose(one.sampler_logps, other.sampler_logps, atol=1e-5)
        assert np.array_equal(one.scores, other.scores) and np.array_equal(one.truncated, other.truncated)


def test_another_iteration_is_another_game_and_samples_differ() -> None:
    first, second = played(0), played(1)
    assert not np.array_equal(first.seqs.tokens, second.seqs.tokens)
    own = [tuple(first.seqs.tokens[b][first.seqs.loss_mask[b]]) for b in range(16)]
    assert len(set(own)) > 12
    assert sorted(set(first.group_ids.tolist())) == [0, 1, 2, 3] and first.version.tolist() == [0] * 16


def test_each_shape_is_traced_once() -> None:
    """Two widths and three sizes at most, over several iterations and weights."""
    _, programs, _ = opened((("env.halvings", 2), ("env.widths", 2)))
    for index in range(4):
        played(index, **{"env.halvings": 2, "env.widths": 2})
    player = programs._episodes
    assert player is not None and player.widths == (68, 104) and player.sizes == (4, 8, 16)
    assert player.compilations() == 0 and 2 <= player._traces == len(player._programs) <= 1 + 2 * 3
    player._traces += 1
    assert programs.compilations() == 1 and player.compilations() == 1  # which, beside the step's own, ends the run


# --- the run ---


def test_what_a_run_logs(rollouts: list[Rollout], tmp_path: pathlib.Path) -> None:
    run("grpo_guess", tmp_path / "run", {"validation.every": 2})
    sampled, lines = rows(tmp_path / "run" / "samples.jsonl"), metrics(tmp_path / "run")
    assert len(sampled) == 16 and [row["step"] for row in sampled] == [1] * 8 + [2] * 8
    for row, (rolled, b) in zip(sampled, [(rolled, b) for rolled in rollouts for b in range(8)]):
        conversation = row["messages"]
        assert conversation[0]["content"].startswith("Guess my number") and conversation[-1]["role"] == "assistant"
        assert [message["role"] for message in conversation] == ["user", "assistant"] * row["turns"]
        assert row["turns"] == turns(rolled)[b] and row["score"] == pytest.approx(float(rolled.scores[b]), abs=1e-5)
        assert row["ended"] == (not rolled.truncated[b]) and row["guesses"] + row["malformed_guesses"] <= row["turns"]
    for rolled, line in zip(rollouts, [line for line in lines if "loss" in line], strict=True):
        assert line["rollout/turns"] == pytest.approx(turns(rolled).mean()) and line["env/failed"] == 0.0
        assert line["rollout/length"] == pytest.approx(rolled.seqs.loss_mask.sum(-1).mean())
        assert line["objective/score"] == pytest.approx(rolled.scores.mean(), abs=1e-5)
        assert line["env/guesses"] == pytest.approx(np.mean([row["guesses"] for row in sampled if row["step"] == line["step"]]))
    (measured,) = [line for line in lines if "eval/objective/score" in line]
    assert set(measured) == {"step", "eval/objective/score", "eval/rollout/length", "eval/rollout/truncated"}


def test_replies_carry_no_gradient_and_no_advantage(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """PPO with a critic: rewards, values' targets and advantages stand at the policy's own tokens; GAE steps over the replies."""
    from rlhf_jax.objectives import ppo

    seen: list[Any] = []
    prepare = ppo.prepare

    def record(*args: Any, **keywords: Any) -> Any:
        found = prepare(*args, **keywords)
        jax.debug.callback(lambda batch: seen.append(jax.tree.map(np.asarray, batch)), found[0].replace(ptx=None))
        return found

    record.__wrapped__ = prepare  # type: ignore[attr-defined]
    monkeypatch.setattr(ppo, "prepare", functools.wraps(prepare)(record))
    guess = tiny("grpo_guess")
    env = {f"env.{key}": value for key, value in guess.env.to_dict().items() if key != "parameters"}
    changes = {**env, "reward_fn": "", "data.train": guess.data.train, "data.valid": guess.data.valid, "data.prompt_length": 32, "run.steps": 1,
               "sampling.max_new_tokens": 3, "sampling.filters": guess.sampling.filters, "objective.gamma": 0.9, "objective.lam": 0.8,
               "objective.kl_coef": 0.0, "run.batch_size": 16, "run.minibatches": 1, "run.epochs": 1}
    run("ppo", tmp_path, changes)
    jax.effects_barrier()
    (batch,) = seen
    mask = batch.seqs.loss_mask
    assert turns(batch).max() > 1
    for values in (batch.rewards, batch.returns, batch.advantages, batch.old_logps):
        assert not values[~mask].any()
    for b in range(len(mask)):  # by hand, over the own tokens in a row as if nothing stood between them
        own = np.flatnonzero(mask[b])
        advantage, following, expected = 0.0, 0.0, []
        for t in own[::-1]:
            advantage = batch.rewards[b, t] + 0.9 * following - batch.values[b, t] + 0.9 * 0.8 * advantage
            following = batch.values[b, t]
            expected.append(advantage + batch.values[b, t])
        np.testing.assert_allclose(batch.returns[b, own], expected[::-1], atol=1e-5)
    np.testing.assert_allclose(masked_sum(batch.rewards, mask), batch.scores - batch.truncated, atol=1e-5)  # the penalty for no end is 1


@pytest.mark.slow
def test_crash_and_resume(tmp_path: pathlib.Path) -> None:
    changes = {**UNEVEN, "log.samples": 8, "run.microbatches": 1}
    train(tiny("grpo_guess", changes), str(tmp_path / "whole"))
    crash("grpo_guess", changes, tmp_path / "run", POINTS["training"], 4)
    train(tiny("grpo_guess", changes), str(tmp_path / "run"))
    same_end(tmp_path / "run", tmp_path / "whole")
    assert max(row["turns"] for row in rows(tmp_path / "whole" / "samples.jsonl")) > 1


@pytest.mark.slow
def test_eight_devices(rollouts: list[Rollout], tmp_path: pathlib.Path) -> None:
    """The same conversations and scores; parameters agree as far as the sums' order goes."""
    changes = {"run.batch_size": 16, "run.steps": 1, "env.halvings": 1}
    run("grpo_guess", tmp_path / "one", changes)
    with uncached():
        run("grpo_guess", tmp_path / "eight", {**changes, "mesh.devices": 8, "mesh.data": 4, "mesh.fsdp": 2})
    one, eight = rollouts
    for name in PLAYED:
        assert np.array_equal(getattr(one.seqs, name), getattr(eight.seqs, name)), name
    assert np.array_equal(one.scores, eight.scores)
    assert rows(tmp_path / "one" / "samples.jsonl") == rows(tmp_path / "eight" / "samples.jsonl")
    for first, second in zip(metrics(tmp_path / "one"), metrics(tmp_path / "eight"), strict=True):
        assert first.keys() == second.keys()
        assert all(float(first[key]) == pytest.approx(float(second[key]), rel=1e-3, abs=1e-5) for key in first)


# --- failures ---


class Brittle(Guess):
    """Raises on guesses of one digit below 5."""

    def step(self, state: Any, response: str) -> Step:
        if response in ("0", "1", "2", "3", "4"):
            raise RuntimeError("brittle")
        return super().step(state, response)


@pytest.mark.parametrize("policy", ["mask", pytest.param("default", marks=pytest.mark.slow)])
def test_failures_are_counted_and_logged(policy: str, rollouts: list[Rollout], tmp_path: pathlib.Path) -> None:
    changes = {"env.name": f"{__name__}.Brittle", "reward_failure.policy": policy, "reward_failure.default": -1.0, "log.samples": 1,
               "run.batch_size": 16, "run.steps": 1}
    run("grpo_guess", tmp_path, changes)
    (rolled,), (line,), sampled = rollouts, metrics(tmp_path), rows(tmp_path / "samples.jsonl")
    failed = np.isnan(rolled.scores) if policy == "mask" else rolled.scores == -1.0
    assert 0 < failed.sum() < 16 and line["env/failed"] == pytest.approx(failed.mean())
    assert line["rollout/unscored"] == pytest.approx(failed.mean() if policy == "mask" else 0.0) and math.isfinite(line["loss"])
    reasons = [row["failed"] for row in sampled if "failed" in row]
    assert len(reasons) == failed.sum() and all("brittle" in reason[f"{__name__}.Brittle"] for reason in reasons)
    assert all(row["messages"][-1]["content"] in "01234" for row in sampled if "failed" in row)


def test_a_failure_ends_the_run(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError) as caught:
        run("grpo_guess", tmp_path, {"env.name": f"{__name__}.Brittle", "run.batch_size": 16})
    assert all(part in str(caught.value) for part in ("config.env.name", "RuntimeError: brittle", "config.reward_failure.policy"))


# --- mistakes ---

MISTAKES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "no such environment": ("grpo_guess", {"env.name": "gues"}, ("config.env.name", "'gues'", "'guess'")),
    "no such parameter": ("grpo_guess", {"env.parameters": {"lo": 1}}, ("config.env.parameters.lo", "'low'")),
    "no such key": ("grpo_guess", {"env.turns": 3}, ("config.env.turns", "max_turns")),
    "no turns": ("grpo_guess", {"env.max_turns": 0}, ("config.env.max_turns", "0")),
    "a reward beside it": ("grpo_guess", {"reward_fn": "rules.brevity"}, ("config.reward_fn", "config.env.name = 'guess'", "exactly one")),
    "longer than the context": ("grpo_guess", {"env.max_tokens": 100}, ("config.env.max_tokens", "32 + 100", "config.model.context = 128")),
    "a turn longer than the episode": ("grpo_guess", {"sampling.max_new_tokens": 80}, ("config.sampling.max_new_tokens = 80", "env.max_tokens")),
    "an opponent": ("xpo", {"env.name": "guess", "env.max_tokens": 64, "reward_fn": ""}, ("config.env.name", "opponent")),
    "rollouts that wait": ("grpo_guess", {"schedule.ahead": 1}, ("config.env.name", "config.schedule.ahead")),
    "slots": ("grpo_guess", {"sampling.slots": 4}, ("config.sampling.slots = 4", "config.env.name")),
    "several hosts": ("grpo_guess", {"mesh.multihost": True}, ("config.mesh.multihost", "one host")),
    "a role without words": ("grpo_calculator", {"env.parameters": {"role": "tool"}}, ("config.env.name", "'tool'", "data.template = 'plain'")),
    "rows of another kind": (
        "grpo_calculator", {"data.train": envs.sample_file("guess"), "data.prompt_length": 32}, ("config.data.train", "'calculator'", "answer")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_bad_input._forbid_training(monkeypatch)
    name, changes, said = MISTAKES[mistake]
    test_bad_input.refused(test_bad_input.changed(name, changes), tmp_path / "run", *said)


# --- learning ---


def test_a_policy_learns_to_play(tmp_path: pathlib.Path) -> None:
    """From noise, a game of two numbers in three turns: say the one, and if it is not that, the other."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Guess my number, 1 to 2.", "low": 1, "high": 2}) + "\n" for _ in range(8)))
    changes = {"run.steps": 30, "run.batch_size": 64, "sampling.group_size": 16, "optimizer.lr": 5e-3, "data.train": str(file), "data.valid": "",
               "checkpoint.every": 0, "log.samples": 0, "env.parameters.turn_cost": 0.0, "env.halvings": 0}
    run("grpo_guess", tmp_path / "run", changes)
    score, wasted = series(tmp_path / "run", "objective/score"), series(tmp_path / "run", "env/malformed_guesses")
    assert np.mean(score[:3]) < 0.5 and np.mean(score[-5:]) > 0.75, score
    assert np.mean(wasted[-5:]) < np.mean(wasted[:3])
