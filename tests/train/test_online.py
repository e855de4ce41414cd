"""Online RL through `train`: one jitted iteration or its stages apart, every kind of reward and critic, and PPO's first-step identities."""

from __future__ import annotations

import math
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoint, sampling
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import Networks, NetworkSpec
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rewards import host, learned
from rlhf_jax.saved import load_source
from rlhf_jax.train.assemble import assemble
from rlhf_jax.train.config import check
from rlhf_jax.train.loop import Result, restore, train
from rlhf_jax.types import Rollout
from tests.train.runs import metrics, outcome, rows, series, snapshot, tiny

SHORT = {"validation.every": 0, "log.samples": 8, "checkpoint.every": 1}
PLAIN = {"run.steps": 1, "run.epochs": 1, "run.minibatches": 1}  # one update on exactly what was rolled out


def learned_reward(run: pathlib.Path, normalise: bool = True) -> dict[str, Any]:
    return {"reward_fn": "", "reward_from": str(run), "reward_normalise": normalise}


def ppo(folder: pathlib.Path, changes: dict[str, Any]) -> Result:
    return train(tiny("ppo", {**SHORT, **changes}), str(folder))


def trained(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The newest checkpoint's parameters by path."""
    params, _ = checkpoint.load_params(str(folder), key="test")
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def said(folder: pathlib.Path) -> list[tuple[int, int, str, bool]]:
    """What was sampled, without the scores."""
    return [(row["step"], row["prompt_id"], row["response"], row["ended"]) for row in rows(folder / "samples.jsonl")]


def close(first: pathlib.Path, second: pathlib.Path) -> None:
    """The same tokens, and every parameter within 1e-5."""
    assert said(first) == said(second)
    one, other = trained(first), trained(second)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_allclose(leaf, other[path], rtol=0, atol=1e-5, err_msg=path)


@pytest.fixture(scope="module")
def fused(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two fused iterations of four updates on a learned reward."""
    folder = tmp_path_factory.mktemp("fused") / "run"
    ppo(folder, {**learned_reward(finished("reward")), "run.steps": 2})
    return folder


def test_fused_equals_staged(fused: pathlib.Path, finished: Any, tmp_path: pathlib.Path) -> None:
    ppo(tmp_path, {**learned_reward(finished("reward")), "run.steps": 2, "fused": False})
    close(fused, tmp_path)
    for one, other in zip(metrics(fused), metrics(tmp_path), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert float(value) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-5), name


REPLAY = '''
import json
SCORES = {{}}
for line in open({path!r}, "rb"):
    row = json.loads(line)
    SCORES[row["messages"][-1]["content"], row["response"]] = row["score"]

def score(prompts, responses, references):
    return [SCORES[prompt[-1]["content"], response] for prompt, response in zip(prompts, responses, strict=True)]
'''


@pytest.fixture
def importable(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """A folder on sys.path; what was imported from it is forgotten afterwards."""
    folder, before = tmp_path / "importable", set(sys.modules)
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_python_reward_runs_the_same_stages(fused: pathlib.Path, importable: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A Python function that gives the scores of the fused run: same tokens, same updates. A token or an order lost would be a KeyError."""
    (importable / "replayed.py").write_text(REPLAY.format(path=str(fused / "samples.jsonl")))
    ppo(tmp_path / "run", {"reward_fn": "replayed.score", "reward_normalise": False, "run.steps": 2})
    close(fused, tmp_path / "run")


def score_directly(run: pathlib.Path, seqs: Any) -> list[float]:
    """The reward model of `run` on token rows, straight from its checkpoint."""
    source = load_source(str(run), "test")
    nets = Networks({}, {"reward": source.params}, NetworkSpec(reward=source.config))
    return [float(score) for score in jax.jit(learned.score_sequences)(nets, jax.tree.map(jax.numpy.asarray, seqs))]


def score_texts(run: pathlib.Path, texts: list[tuple[list[Any], str, bool]]) -> list[float]:
    """The same on (messages, response, ended), each rendered by the reward model's template and cut into its own tokens."""
    source = load_source(str(run), "test")
    encoder = Encoder(source.tokenizer, source.layout("test"), max_length=source.config.context, prompt_length=None, overlong="truncate")
    tokens = [host.response_tokens(encoder, *text) for text in texts]
    return score_directly(run, host.padded_rows(tokens, bucket=8, max_length=encoder.max_length, pad_id=encoder.tokenizer.pad_id))


@pytest.mark.parametrize("name", ["reward", pytest.param("reward_smaller", marks=pytest.mark.slow)])
def test_learned_reward_scores_the_rollouts_tokens(name: str, finished: Any, tmp_path: pathlib.Path, rollouts: list[Rollout]) -> None:
    """A reward model as large as the policy, or smaller, reads exactly the tokens that are trained on, in one jitted iteration."""
    run = finished(name)
    rollouts.clear()
    ppo(tmp_path, {**learned_reward(run, normalise=False), **PLAIN})
    (rolled,) = rollouts
    direct = score_directly(run, rolled.seqs)
    np.testing.assert_allclose(rolled.scores, direct, rtol=1e-5, atol=1e-6)
    assert np.std(rolled.scores) > 0
    assert [row["score"] for row in rows(tmp_path / "samples.jsonl")] == pytest.approx(direct, abs=1e-5)


@pytest.mark.slow
def test_reward_with_another_tokenizer_reads_the_text(finished: Any, tmp_path: pathlib.Path, rollouts: list[Rollout]) -> None:
    """Each response is rendered and tokenized anew: the scores are those of the texts, whatever the policy's tokens were."""
    run = finished("reward_bpe")
    rollouts.clear()
    ppo(tmp_path, {**learned_reward(run), **PLAIN, "run.steps": 2})
    meta = load_source(str(run), "test").meta
    sampled = rows(tmp_path / "samples.jsonl")
    assert len(sampled) == 16
    direct = score_texts(run, [(row["messages"], row["response"], row["ended"]) for row in sampled])
    expected = [(score - meta["reward_mean"]) / meta["reward_std"] for score in direct]
    assert [row["score"] for row in sampled] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert [float(score) for rolled in rollouts for score in rolled.scores] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_reward_normalisation(finished: Any, tmp_path: pathlib.Path) -> None:
    """The moments over the pairs that a validation reads are stored with the reward model, and PPO's scores are (raw − mean) / std."""
    run = finished("reward")
    meta, config = load_source(str(run), "test").meta, tiny("reward")
    pairs = rows(pathlib.Path(config.data.valid))[: config.validation.batches * config.run.batch_size]
    asked = [[{"role": "user", "content": pair["prompt"]}] for pair in pairs]
    scores = score_texts(run, [(ask, pair[branch], True) for ask, pair in zip(asked, pairs) for branch in ("chosen", "rejected")])
    assert meta["reward_mean"] == pytest.approx(np.mean(scores), abs=1e-5)
    assert meta["reward_std"] == pytest.approx(np.std(scores), rel=1e-4)

    ppo(tmp_path / "raw", {**learned_reward(run, normalise=False), **PLAIN})
    ppo(tmp_path / "normalised", {**learned_reward(run), **PLAIN})
    assert said(tmp_path / "raw") == said(tmp_path / "normalised")
    raw, normalised = ([row["score"] for row in rows(tmp_path / name / "samples.jsonl")] for name in ("raw", "normalised"))
    expected = [(score - meta["reward_mean"]) / meta["reward_std"] for score in raw]
    assert normalised == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["separate", pytest.param("shared", marks=pytest.mark.slow)])
def test_first_iteration(kind: str, tmp_path: pathlib.Path) -> None:
    """Before the first update the policy is its own reference and its own past: ratio 1, KL 0, nothing clipped. And a response without a
    stop token costs the penalty."""
    ppo(tmp_path, {**PLAIN, "critic.kind": kind, "objective.missing_eos_penalty": 3.0, "sampling.max_new_tokens": 8})
    (line,) = metrics(tmp_path)
    assert line["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert line["objective/non_score_reward"] == pytest.approx(0, abs=1e-6)
    assert line["policy/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert line["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert line["policy/clip_frac"] == 0
    assert line["value/clip_frac"] == 0
    assert line["objective/kl_coef"] == pytest.approx(0.05)
    sampled = rows(tmp_path / "samples.jsonl")
    truncated = np.mean([not row["ended"] for row in sampled])
    assert line["rollout/truncated"] == pytest.approx(truncated) and truncated > 0
    assert line["objective/score"] == pytest.approx(np.mean([row["score"] for row in sampled]), abs=1e-5)
    assert line["objective/rlhf_reward"] == pytest.approx(line["objective/score"] - 3.0 * truncated, abs=1e-5)


def test_later_updates_move_the_ratio(fused: pathlib.Path) -> None:
    """The identities above are not identities of the code: with four updates per rollout they do not hold."""
    assert all(value > 1e-6 for value in series(fused, "policy/approx_kl"))
    assert series(fused, "objective/kl")[1] != pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_adaptive_kl_coefficient(tmp_path: pathlib.Path) -> None:
    """c ← c · (1 + clip(KL / target − 1, ±0.2) · n / horizon), carried over iterations and in the checkpoint."""
    config = tiny("ppo", {**SHORT, "run.steps": 3, "checkpoint.keep": 3, "objective.kl_target": 1.0, "objective.kl_horizon": 64.0})
    train(config, str(tmp_path))
    coefficients, kls = series(tmp_path, "objective/kl_coef"), series(tmp_path, "objective/kl")
    expected = [0.05]
    for kl in kls:
        expected.append(expected[-1] * (1 + float(np.clip(kl - 1, -0.2, 0.2)) * 8 / 64))
    assert coefficients == pytest.approx(expected[:3], rel=1e-5)
    assert len(set(coefficients)) == 3

    exp = assemble(*check(config))
    with checkpoint.Checkpointer(tmp_path / "checkpoints", every=0, keep=3) as saver:
        state, step = restore(exp, saver)
    assert step == 3
    assert float(state.carry["kl_coef"]) == pytest.approx(expected[3], rel=1e-5)

    undisturbed = outcome(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    (tmp_path / "final.json").unlink()
    train(config, str(tmp_path))
    assert outcome(tmp_path) == undisturbed


# --- filters ---


def test_filters_and_stop_strings_of_the_config(tmp_path: pathlib.Path, rollouts: list[Rollout]) -> None:
    """Groups of four write three letters alone, never "bb", and end with "ab"; what was sampled is what is logged, scored and trained on, and the
    unfiltered log-probs of the sampler are the trainer's."""
    rollouts.clear()
    letters = tuple(Tokenizer.byte_level().encode("abc")[0].tolist())
    listed = ({"name": "allowed", "ids": letters}, {"name": "bad_words", "words": ("bb",)}, {"name": "min_p", "p": 0.01})
    config = tiny("grpo", {**SHORT, "run.steps": 1, "sampling.filters": listed, "sampling.stop_strings": ("ab",), "sampling.temperature": 1.5,
                           "sampling.max_new_tokens": 12})
    train(config, str(tmp_path))
    exp, (rolled,) = assemble(*check(config)), rollouts
    said = rows(tmp_path / "samples.jsonl")
    assert len(said) == 8 and any(row["ended"] for row in said)
    for row in said:
        text = row["response"]
        assert set(text) <= set("abc") and "bb" not in text and "ab" not in text[:-1]
        assert row["ended"] == text.endswith("ab") and (row["ended"] or len(text) == 12)
    plain = jax.jit(lambda params, seqs: Networks(params, exp.frozen, exp.spec).policy(seqs).logps)(exp.start.state().params, rolled.seqs)
    mask = rolled.seqs.loss_mask
    assert np.abs(np.asarray(plain) - rolled.plain_logps)[mask].max() <= 1e-4 < np.abs(rolled.plain_logps - rolled.sampler_logps)[mask].min()

    # So they may be taken for the old ones, without a pass of the trainer's: the same update, and a first ratio of 1 but for rounding.
    config.sampling.old_logps = "sampler"
    train(config, str(tmp_path / "sampler"))
    read, taken = (metrics(folder)[0] for folder in (tmp_path, tmp_path / "sampler"))
    assert taken["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4) and read["policy/ratio_max"] == pytest.approx(1.0, abs=1e-6)
    for name in ("objective/kl", "optimizer/grad_norm", "loss/kl"):
        assert taken[name] == pytest.approx(read[name], rel=1e-3, abs=1e-5), name  # a sum of 12 roundings


def test_slots_of_the_config_change_nothing_but_the_work(tmp_path: pathlib.Path) -> None:
    """Two groups of four, one of them at a time."""
    for slots in (0, 4):
        train(tiny("grpo", {**SHORT, "run.steps": 1, "sampling.slots": slots}), str(tmp_path / str(slots)))
    close(tmp_path / "4", tmp_path / "0")


# --- opponents ---


@pytest.mark.parametrize(("name", "changes"), [
    ("xpo", {}), pytest.param("nash_md", {"objective.mixture": 1.0, "reward_from": "@reward", "reward_fn": ""}, marks=pytest.mark.slow)])
def test_the_opponent_draws_every_second_sample(
    name: str, changes: dict[str, Any], finished: Any, tmp_path: pathlib.Path, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart with a host reward and in one program with a learned one: odd rows are the reference's (a mixture of 1 is the reference), even rows the
    policy's, which has moved away by then. A validation measures the policy alone."""
    traced, original = [], sampling.generate_against
    monkeypatch.setattr(sampling, "generate_against", lambda *given, **how: traced.append(given) or original(*given, **how))
    changes = {key: str(finished(value[1:])) if value == "@reward" else value for key, value in changes.items()}
    rollouts.clear()
    config = tiny(name, {"run.steps": 2, "log.samples": 0, "validation.every": 2, "optimizer.lr": 1e-2, **changes})
    train(config, str(tmp_path))
    assert len(traced) == 1
    exp = assemble(*check(config))
    first, second = (jax.tree.map(jax.numpy.asarray, rolled) for rolled in rollouts)
    reference = jax.jit(lambda seqs: Networks({}, exp.frozen, exp.spec).ref(seqs).logps)
    for rolled, moved in ((first, False), (second, True)):
        gap = np.abs(np.asarray(rolled.sampler_logps - reference(rolled.seqs)) * rolled.seqs.loss_mask)
        assert gap[1::2].max() < 2e-5 and (gap[::2].max() > 1e-2) == moved
        assert rolled.sample_ids.tolist() == [0, 1] * 4
        assert (rolled.prompt_ids[::2] == rolled.prompt_ids[1::2]).all()
    assert series(tmp_path, "objective/kl")[0] == pytest.approx(0, abs=1e-5) and abs(series(tmp_path, "objective/kl")[1]) > 1e-3


# --- where the critic starts ---


def started(changes: dict[str, Any]) -> dict[str, Any]:
    """The first state's networks."""
    return jax.device_get(assemble(*check(tiny("ppo", changes))).start.state().params)


def same(first: Any, second: Any) -> bool:
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.array_equal(one, other) for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second))
    )


def test_critic_from_the_policy(finished: Any) -> None:
    """The trunk is the initial policy's, the value head new."""
    sft = load_source(str(finished("sft")), "test").params["ends"], load_source(str(finished("sft")), "test").params["layers"]
    networks = started({"init_from": str(finished("sft")), "critic.init_from": "policy"})
    for network in networks.values():
        assert same(network["layers"], sft[1])
        assert same(network["ends"]["embedding"], sft[0]["embedding"])
    assert same(networks["policy"]["ends"]["lm_head"], sft[0]["lm_head"])
    assert set(networks["critic"]["ends"]) == {"embedding", "norm", "value_head"}


def test_critic_from_scratch(finished: Any) -> None:
    networks = started({"init_from": str(finished("sft")), "critic.init_from": ""})
    assert not same(networks["critic"]["layers"], networks["policy"]["layers"])
    assert not same(networks["critic"]["ends"]["embedding"], networks["policy"]["ends"]["embedding"])


@pytest.mark.parametrize("name", ["reward", pytest.param("reward_smaller", marks=pytest.mark.slow)])
def test_critic_from_the_reward_model(name: str, finished: Any) -> None:
    """All of it, its size included, and the score head is the value head."""
    reward = load_source(str(finished(name)), "test").params
    networks = started({"init_from": str(finished("sft")), "critic.init_from": str(finished(name))})
    assert same(networks["critic"]["layers"], reward["layers"])
    assert same(networks["critic"]["ends"]["embedding"], reward["ends"]["embedding"])
    assert same(networks["critic"]["ends"]["value_head"]["kernel"], reward["ends"]["score_head"]["kernel"])
    assert not networks["critic"]["ends"]["value_head"]["bias"].any()


def test_shared_critic(finished: Any) -> None:
    """One trunk with two heads; the policy's comes from the checkpoint, the value head is new."""
    networks = started({"init_from": str(finished("sft")), "critic.kind": "shared"})
    assert set(networks) == {"policy"}
    assert set(networks["policy"]["ends"]) == {"embedding", "norm", "lm_head", "value_head"}
    assert same(networks["policy"]["ends"]["lm_head"], load_source(str(finished("sft")), "test").params["ends"]["lm_head"])


@pytest.mark.slow
def test_networks_of_three_sizes(finished: Any, tmp_path: pathlib.Path) -> None:
    """A policy with a smaller critic and a smaller reward model, in one fused program; the checkpoint says what each is."""
    small = str(finished("reward_smaller"))
    before = snapshot(pathlib.Path(small))
    ppo(tmp_path, {**learned_reward(finished("reward_smaller")), **PLAIN, "run.steps": 2, "critic.init_from": small})
    params, meta = checkpoint.load_params(str(tmp_path), key="test")
    assert (ModelConfig.from_json(meta["model"]).hidden, ModelConfig.from_json(meta["critic_model"]).hidden) == (16, 8)
    assert {name: tree["ends"]["embedding"].shape[1] for name, tree in params.items()} == {"policy": 16, "critic": 8}
    score_head = load_source(small, "test").params["ends"]["score_head"]
    assert not same(params["critic"]["ends"]["value_head"]["kernel"], score_head["kernel"]), "the critic trains"
    assert snapshot(pathlib.Path(small)) == before, "and its source does not"
    assert all(math.isfinite(float(value)) for line in metrics(tmp_path) for value in line.values())
