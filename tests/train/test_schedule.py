"""Rollouts ahead of updates, refilled, replayed; a reference that follows, a critic that goes first: against slow loops, killed, on 8 devices."""

from __future__ import annotations

import importlib
import logging
import pathlib
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoint, distributed, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import rules
from rlhf_jax.train import online, schedule
from rlhf_jax.train.assemble import assemble
from rlhf_jax.train.config import check
from rlhf_jax.train.loop import restore, train
from rlhf_jax.train.optimizer import evaluation_params
from rlhf_jax.train.programs import Programs
from rlhf_jax.train.rewarding import completions
from rlhf_jax.train.step import make_step
from rlhf_jax.types import Rollout
from tests.train.killed import POINTS
from tests.train.runs import metrics, outcome, rows, series, steps, tiny
from tests.train.test_resume import crash

FAST = {"validation.every": 0, "checkpoint.every": 0, "optimizer.lr": 1e-2, "log.samples": 8}
WEIGHED = {"objective.correction": "token_truncate"}
# Few letters, so that many of them are said by all four samples or by none.
COARSE = '''
def vowels(prompts, responses, references):
    return [float(sum(letter in "aeiou" for letter in response) > 0) for response in responses]
'''


@pytest.fixture
def importable(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "coarse.py").write_text(COARSE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    importlib.invalidate_caches()
    return tmp_path / "code"


def parameters(folder: pathlib.Path, step: int | str = "latest") -> dict[str, np.ndarray]:
    params, _ = checkpoint.load_params(str(folder), key="test", which=step)  # type: ignore[arg-type]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


# --- asynchrony ---


def slow(config: Any, ahead: int) -> tuple[list[Rollout], dict[str, np.ndarray]]:
    """The definition: every iteration's weights are kept, and iteration i samples with those of iteration max(0, i − ahead)."""
    exp = assemble(*check(config))
    run, where = exp.config["run"], sharding.row_sharding(exp.mesh)
    draw = sharding.jit(online.make_rollout(exp.spec, exp.config["sampling"], stop_ids=exp.tokenizer.stop_ids, pad_id=exp.tokenizer.pad_id,
                                            group_size=4), exp.mesh)
    step = sharding.jit(make_step(exp.objective, exp.spec, exp.optimizer, exp.rate, microbatches=run["microbatches"], epochs=run["epochs"],
                                  minibatches=run["minibatches"]), exp.mesh)
    state, kept, rollouts = exp.start.state(), [], []
    for i in range(exp.steps):
        kept.append(state.params)
        version = max(0, i - ahead)
        rolled = draw(kept[version], exp.frozen, distributed.to_global(exp.batch(i), where), state.key, jnp.int32(i))
        scores = rules.brevity([], [row["response"] for row in completions(exp, rolled, exp.train_data)], [])
        rolled = rolled.replace(scores=jnp.asarray(scores, jnp.float32), version=jnp.full_like(rolled.version, version))
        rollouts.append(jax.device_get(rolled))
        state, _ = step(state, exp.frozen, rolled)
    return rollouts, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]}


@pytest.mark.parametrize("ahead", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2])
def test_ahead_against_a_loop_that_keeps_the_old_weights(ahead: int, tmp_path: pathlib.Path, rollouts: list[Rollout]) -> None:
    """The tokens, versions and updates are those of the definition; ahead = 0 is the same loop without old weights."""
    config = tiny("grpo", {**FAST, **WEIGHED, "run.steps": 4, "schedule.ahead": ahead})
    train(config, str(tmp_path))
    expected, final = slow(config, ahead)
    for found, wanted in zip(rollouts, expected, strict=True):
        np.testing.assert_array_equal(found.seqs.tokens, wanted.seqs.tokens)
        np.testing.assert_array_equal(found.version, wanted.version)
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-6)
    for path, leaf in parameters(tmp_path).items():
        np.testing.assert_allclose(leaf, final[path], rtol=0, atol=1e-5, err_msg=path)
    assert series(tmp_path, "rollout/staleness") == [min(i, ahead) for i in range(4)]
    gaps = series(tmp_path, "rollout/logp_gap_max")
    assert gaps[0] < 1e-5 and (min(gaps[1:]) > 1e-3 if ahead else max(gaps) < 1e-5), "old samples are told by their log-probs"


SLEEPER = '''
import random, threading, time
from rlhf_jax.rewards import rules
threads, busy, met = set(), threading.Lock(), []
def score(prompts, responses, references):
    threads.add(threading.current_thread().name)
    if not busy.acquire(blocking=False):
        met.append(len(responses))
        busy.acquire()
    time.sleep(random.SystemRandom().choice([0.0, 0.05, 0.3]))
    busy.release()
    return rules.brevity(prompts, responses, references)
'''


@pytest.mark.slow
def test_time_decides_nothing(tmp_path: pathlib.Path, importable: pathlib.Path) -> None:
    """Rewards that take as long as they like, in a thread of their own, a validation's too: no two calls at once."""
    (importable / "sleeper.py").write_text(SLEEPER)
    changes = {**FAST, **WEIGHED, "run.steps": 5, "schedule.ahead": 2, "validation.every": 2}
    for name, function in (("plain", "rules.brevity"), ("sleepy", "sleeper.score")):
        train(tiny("grpo", {**changes, "reward_fn": function}), str(tmp_path / name))
    plain, sleepy = (outcome(tmp_path / name) for name in ("plain", "sleepy"))
    assert plain == sleepy
    sleeper = importlib.import_module("sleeper")
    assert all(name.startswith("rewards") for name in sleeper.threads) and not sleeper.met
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rewards") and _lives(thread)]


def _lives(thread: threading.Thread) -> bool:
    end = time.monotonic() + 5
    while thread.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    return thread.is_alive()


def test_a_reward_that_raises_ends_the_run_where_it_is_due(tmp_path: pathlib.Path, importable: pathlib.Path) -> None:
    (importable / "third.py").write_text('''
calls = []
def score(prompts, responses, references):
    calls.append(len(responses))
    if len(calls) == 3:
        raise ValueError("no idea")
    return [0.1 * len(response) for response in responses]
''')
    with pytest.raises(UserError, match="no idea"):
        changes = {**FAST, **WEIGHED, "run.steps": 6, "schedule.ahead": 2, "reward_fn": "third.score", "checkpoint.every": 1}
        train(tiny("grpo", changes), str(tmp_path / "run"))
    assert steps(tmp_path / "run" / "checkpoints") == [1, 2], "two iterations had their scores"


# --- the rest of the schedule ---


def test_refilled_batches_hold_groups_that_differ(tmp_path: pathlib.Path, importable: pathlib.Path, rollouts: list[Rollout]) -> None:
    """Every prompt is used once in the order of the data, rounds after rounds; what is not kept is counted."""
    config = tiny("dapo", {**FAST, "run.steps": 3, "run.minibatches": 1, "schedule.refill": 2, "reward_fn": "coarse.vowels",
                           "sampling.max_new_tokens": 16, "run.batch_size": 16})
    train(config, str(tmp_path / "run"))
    exp = assemble(*check(config))
    rounds, lines = [int(x) for x in series(tmp_path / "run", "rollout/rounds")], metrics(tmp_path / "run")
    assert max(rounds) > 1
    drawn = 0
    for rolled, count, line in zip(rollouts, rounds, lines, strict=True):
        asked = [int(i) for number in range(drawn, drawn + count) for i in exp.batch(number).prompt_ids[::4]]
        drawn += count
        kept = [int(i) for i in rolled.prompt_ids[::4] if i >= 0]
        assert [i for i in asked if i in kept][: len(kept)] == kept
        scores = np.asarray(rolled.scores).reshape(-1, 4)[: len(kept)]
        assert ((scores.max(-1) > scores.min(-1)).all() and count == 3) or len(kept) == 4
        dropped, surplus = (round(float(line[f"rollout/{what}_groups"]) * 4 * count) for what in ("dropped", "surplus"))
        assert dropped + surplus + len(kept) == 4 * count
        assert float(line["rollout/filler_rows"]) == 1 - len(kept) / 4
        assert float(line["rollout/filtered_groups"]) == 0.0
    with checkpoint.Checkpointer(tmp_path / "run" / "checkpoints", every=0, keep=1) as saver:
        state, _ = restore(exp, saver, Programs(exp))
    assert int(state.online.cursor) == drawn == sum(rounds)


def test_replayed_rows_are_weighed_and_counted(tmp_path: pathlib.Path, rollouts: list[Rollout]) -> None:
    config = tiny("grpo", {**FAST, **WEIGHED, "run.steps": 4, "schedule.replay": 0.5, "schedule.capacity": 8})
    train(config, str(tmp_path))
    assert [len(rolled.prompt_ids) for rolled in rollouts] == [4] * 4, "half the batch is sampled"
    assert series(tmp_path, "rollout/replayed") == [0.0, 0.5, 0.5, 0.5]
    ages = series(tmp_path, "rollout/staleness")
    assert ages[:2] == [0.0, 0.5] and all(age in (0.5, 1.0) for age in ages[2:])
    assert series(tmp_path, "policy/correction_max")[0] == pytest.approx(1, abs=1e-4) and series(tmp_path, "policy/correction_max")[1] > 1.001


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_reference_becomes_the_policy(fused: bool, finished: Any, tmp_path: pathlib.Path) -> None:
    """After every second iteration: the KL is 0 at first and again then, fused and staged alike."""
    changes = {**FAST, "run.steps": 5, "reward_fn": "", "reward_from": str(finished("reward")), "fused": fused, "schedule.refresh": 2}
    train(tiny("grpo", changes), str(tmp_path))
    kls = [abs(kl) for kl in series(tmp_path, "objective/kl")]
    assert max(kls[0], kls[2], kls[4]) < 1e-5 and min(kls[1], kls[3]) > 1e-3


def test_the_critic_goes_first(tmp_path: pathlib.Path) -> None:
    """Two iterations leave the policy and its average as they were, and not the critic; the third moves it, no further than its rate."""
    config = tiny("ppo", {**FAST, "run.steps": 3, "run.epochs": 1, "checkpoint.every": 1, "checkpoint.keep": 3, "optimizer.ema_decay": 0.5,
                          "schedule.critic_only": 2, "optimizer.lr": 1e-3, "optimizer.weight_decay": 0.1,
                          "objective.kl_horizon": 64.0})
    exp = assemble(*check(config))
    first = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(exp.start.state().params)[0]}
    train(config, str(tmp_path))
    for step in (1, 2, 3):
        now = parameters(tmp_path, step)
        moved = {name: max(float(np.abs(now[path] - first[path]).max()) for path in now if f"'{name}'" in path) for name in ("policy", "critic")}
        assert (moved["policy"] > 0) == (step == 3) and moved["critic"] > 1e-4, step
        assert moved["policy"] < 2.5e-3, "two updates of its rate: the moments are warm"
    assert series(tmp_path, "policy/ratio_max")[0] == pytest.approx(1.0, abs=1e-4)
    coefficients = series(tmp_path, "objective/kl_coef")
    assert coefficients == pytest.approx([0.05] * 3, rel=1e-6), "a controller has nothing to control while the policy stands still"
    with checkpoint.Checkpointer(tmp_path / "checkpoints", every=0, keep=3) as saver:
        state, _ = restore(exp, saver)
    assert float(state.carry["kl_coef"]) < 0.05, "and goes on afterwards"


# --- killed, and on other meshes ---

ALL = {
    "ahead": ("grpo", {**WEIGHED, "schedule.ahead": 2, "schedule.replay": 0.5, "schedule.capacity": 8, "schedule.refresh": 3}),
    "refill": ("dapo", {**WEIGHED, "schedule.ahead": 1, "schedule.refill": 2, "reward_fn": "coarse.vowels", "sampling.max_new_tokens": 12,
                        "run.minibatches": 1}),
    "critic": ("ppo", {**WEIGHED, "schedule.ahead": 1, "schedule.critic_only": 3, "run.epochs": 1}),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind != "ahead" else ()) for kind in ALL])
def test_a_crash_anywhere_changes_nothing(kind: str, tmp_path: pathlib.Path, importable: pathlib.Path) -> None:
    """With rollouts in flight, a cursor, a memory and a moved reference in the checkpoint."""
    name, changes = ALL[kind]
    changes = {**FAST, **changes, "run.steps": 6, "checkpoint.every": 2}
    train(tiny(name, changes), str(tmp_path / "whole"))
    run = tmp_path / "run"
    crash(name, changes, run, POINTS["training"], 4)
    assert steps(run / "checkpoints") == [2]
    crash(name, changes, run, POINTS["rewarding"], 3)
    train(tiny(name, changes), str(run))
    assert outcome(run) == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ahead", "refill"])
def test_eight_devices(kind: str, tmp_path: pathlib.Path, importable: pathlib.Path) -> None:
    """The same tokens, dropped groups and replayed rows, and nearly the same parameters."""
    name, changes = ALL[kind]
    changes = {**FAST, **changes, "run.steps": 4, "run.batch_size": 16, "run.microbatches": 1, "optimizer.lr": 1e-3}
    changes |= {"schedule.capacity": 16} if kind == "ahead" else {}
    train(tiny(name, changes), str(tmp_path / "one"))
    train(tiny(name, {**changes, "mesh.data": 8, "mesh.devices": 8}), str(tmp_path / "eight"))
    one, eight = (rows(tmp_path / which / "samples.jsonl") for which in ("one", "eight"))
    assert [(row["step"], row["prompt_id"], row["response"]) for row in one] == [(row["step"], row["prompt_id"], row["response"]) for row in eight]
    for key in ("rollout/staleness", "rollout/rounds", "rollout/dropped_groups", "rollout/replayed"):
        assert series(tmp_path / "one", key) == series(tmp_path / "eight", key), key
    for key in ("policy/ratio_p99", "policy/ratio_max", "rollout/logp_gap_p99", "objective/kl_from_reference"):
        np.testing.assert_allclose(series(tmp_path / "one", key), series(tmp_path / "eight", key), rtol=0.08, atol=2e-5, err_msg=key)
    first, second = parameters(tmp_path / "one"), parameters(tmp_path / "eight")
    assert max(float(np.abs(first[path] - second[path]).max()) for path in first) < 1e-3


# --- mistakes ---

MISTAKES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "no correction": ("grpo", {"schedule.ahead": 1}, ("config.objective.correction = 'none'", "config.schedule.ahead = 1", "biased")),
    "no correction of replay": ("ppo", {"schedule.replay": 0.5, "schedule.capacity": 8}, ("correction", "config.schedule.replay = 0.5")),
    "as far ahead as the run is long": ("grpo", {**WEIGHED, "schedule.ahead": 4}, ("config.schedule.ahead = 4", "run.steps = 4")),
    "a reference that stays": ("grpo", {"schedule.refresh": 4, "run.steps": 4}, ("config.schedule.refresh = 4", "run.steps = 4", "less than 4")),
    "a policy that stays": ("ppo", {"schedule.critic_only": 9, "run.steps": 4}, ("config.schedule.critic_only = 9", "never train its policy")),
    "the sampler's log-probs of older weights": (
        "grpo", {**WEIGHED, "schedule.ahead": 1, "sampling.old_logps": "sampler"}, ("config.sampling.old_logps", "schedule.ahead = 1", "'trainer'")),
    "the sampler's log-probs of earlier rows": (
        "grpo", {**WEIGHED, "schedule.replay": 0.5, "schedule.capacity": 8, "sampling.old_logps": "sampler"},
        ("config.sampling.old_logps", "config.schedule.replay = 0.5")),
    "the sampler's log-probs over a rounded cache": (
        "grpo", {"sampling.cache": "int8", "sampling.old_logps": "sampler"}, ("config.sampling.old_logps", "config.sampling.cache = 'int8'")),
    "refill of single samples": ("ppo", {"schedule.refill": 1}, ("config.schedule.refill", "group_size = 1")),
    "refill by epochs": ("dapo", {"schedule.refill": 1, "run.steps": 0, "run.data_epochs": 1.0}, ("config.schedule.refill", "data_epochs")),
    "refill without scores": ("on_policy_gkd", {"schedule.refill": 1, "reference_from": "init"}, ("config.schedule.refill", "no score")),
    "replay without capacity": ("grpo", {**WEIGHED, "schedule.replay": 0.5}, ("config.schedule.replay", "config.schedule.capacity")),
    "half a group": ("grpo", {**WEIGHED, "schedule.replay": 0.25, "schedule.capacity": 8}, ("schedule.replay = 0.25", "2 rows", "group_size = 4")),
    "too little room": ("grpo", {**WEIGHED, "run.batch_size": 16, "schedule.replay": 0.5, "schedule.capacity": 4}, ("schedule.capacity = 4", "8")),
    "no reference": ("dapo", {"schedule.refresh": 2}, ("config.schedule.refresh = 2", "reference_from = 'init'")),
    "a teacher": ("on_policy_gkd", {"schedule.refresh": 2, "reference_from": "init"}, ("config.schedule.refresh = 2", "learns from its reference")),
    "no critic": ("grpo", {"schedule.critic_only": 1}, ("config.schedule.critic_only = 1", "config.critic.kind")),
    "a second data set": ("ppo_ptx", {**WEIGHED, "schedule.replay": 0.5, "schedule.capacity": 8}, ("config.schedule.replay", "config.ptx")),
    "typo": ("grpo", {"schedule.refresh": -1}, ("config.schedule.refresh = -1",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_schedule_cannot_do_is_refused(mistake: str) -> None:
    name, changes, said = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        check(tiny(name, changes))
    assert all(part in str(caught.value) for part in said) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize("key", ["ahead", "refresh", "critic_only"])
def test_a_schedule_longer_than_the_epochs_is_refused(key: str) -> None:
    """How many steps they are is known once the data is read."""
    config = tiny("ppo", {**WEIGHED, "run.steps": 0, "run.data_epochs": 1.0, f"schedule.{key}": 500})
    with pytest.raises(UserError, match=rf"config.schedule.{key} = 500: .* config.run.data_epochs = 1, which are \d+ steps"):
        assemble(*check(config))


def test_an_objective_without_a_correction_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "absl"):
        check(tiny("online_dpo", {"schedule.ahead": 1}))
    assert "online_dpo has no importance correction" in caplog.text
    assert schedule.of(tiny("online_dpo").to_dict()) == schedule.Schedule()


def test_evaluation_params_is_what_the_average_holds() -> None:
    """The average is read where the policy was held back (test_the_critic_goes_first reads the parameters)."""
    config = tiny("ppo", {"optimizer.ema_decay": 0.5, "schedule.critic_only": 2, "run.steps": 3})
    exp = assemble(*check(config))
    state = exp.start.state()
    grads = jax.tree.map(jnp.ones_like, state.params)
    _, opt_state = exp.optimizer.update(grads, state.opt_state, state.params, held=jnp.array(True))
    average = evaluation_params(state.params, opt_state)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(average["policy"]), jax.tree.leaves(state.params["policy"]), strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(average["critic"]), jax.tree.leaves(state.params["critic"]), strict=True))
