"""Users' mistakes end in one sentence that names the key or the file's line, before training starts, and leave the workdir as it was."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import pytest

from rlhf_jax.data import sample_file
from rlhf_jax.errors import UserError
from rlhf_jax.train.assemble import Start
from rlhf_jax.train.loop import train
from rlhf_jax.train.programs import Programs
from tests.train.runs import snapshot, tiny, write_rows

ABSENT = object()  # the key is taken out of the config
ANSWERED = {"prompt": "2 + 2?", "completion": "4"}
PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


@pytest.fixture(autouse=True)
def nothing_trains(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Neither a first state is drawn nor a batch advanced: the mistake is found before the expensive part."""
    if "finished" not in request.fixturenames:  # such tests train what they start from, and forbid it afterwards
        _forbid_training(monkeypatch)


def _forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        pytest.fail("training began")

    monkeypatch.setattr(Start, "state", fail)
    monkeypatch.setattr(Programs, "advance", fail)


def changed(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The config as plain dicts, which, unlike a ConfigDict, take any value."""
    values = tiny(name).to_dict()
    for key, value in changes.items():
        *sections, last = key.split(".")
        node = values
        for section in sections:
            node = node[section]
        if value is ABSENT:
            del node[last]
        else:
            node[last] = value
    return values


def refused(config: Any, workdir: pathlib.Path, *said: str) -> None:
    before = snapshot(workdir)
    with pytest.raises(UserError) as caught:
        train(config, str(workdir))
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in said:
        assert part in sentence, sentence
    assert snapshot(workdir) == before


CONFIG_MISTAKES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "typo in a section": ("sft", {"run.batchsize": 4}, ("config.run.batchsize", "batch_size")),
    "typo in the model": ("sft", {"model.hiden": 4}, ("config.model.hiden", "hidden")),
    "typo at the top": ("sft", {"sed": 1}, ("config.sed", "seed")),
    "key left out": ("sft", {"run.epochs": ABSENT}, ("config.run", "epochs")),
    "section left out": ("sft", {"data": ABSENT}, ("config.data",)),
    "section that is a value": ("sft", {"optimizer": 3}, ("config.optimizer", "3")),
    "str for an int": ("sft", {"run.steps": "4"}, ("config.run.steps", "'4'", "int")),
    "float for an int": ("sft", {"run.batch_size": 4.0}, ("config.run.batch_size", "4.0", "int")),
    "bool for an int": ("sft", {"run.steps": True}, ("config.run.steps", "True")),
    "str for a float": ("sft", {"optimizer.lr": "1e-3"}, ("config.optimizer.lr", "'1e-3'", "float")),
    "str for a model size": ("sft", {"model.hidden": "abc"}, ("config.model.hidden", "'abc'")),
    "int for a bool": ("sft", {"data.pack": 1}, ("config.data.pack", "1")),
    "out of range": ("sft", {"optimizer.b1": 1.5}, ("config.optimizer.b1", "1.5", "1")),
    "learning rate 0": ("sft", {"optimizer.lr": 0.0}, ("config.optimizer.lr", "0.0")),
    "learning rate nan": ("sft", {"optimizer.lr": float("nan")}, ("config.optimizer.lr", "nan")),
    "no such optimizer": ("sft", {"optimizer.name": "adam"}, ("config.optimizer.name", "'adam'", "adamw")),
    "heads": ("sft", {"model.kv_heads": 3}, ("config.model.kv_heads", "3", "config.model.heads")),
    "no steps": ("sft", {"run.steps": 0}, ("config.run.steps", "config.run.data_epochs")),
    "batch does not divide": ("sft", {"run.batch_size": 5}, ("config.run.batch_size", "5", "2")),
    "batch and devices": ("sft", {"mesh.data": 8, "mesh.devices": 8}, ("config.run.batch_size", "8 devices")),
    "batch and what is left": ("sft", {"mesh.data": -1, "mesh.devices": 8}, ("config.run.batch_size", "8 devices")),
    "groups": ("grpo", {"run.batch_size": 6, "run.microbatches": 1}, ("config.run.batch_size", "6", "config.sampling.group_size")),
    "slots and groups": ("grpo", {"sampling.slots": 6}, ("config.sampling.slots", "6", "config.sampling.group_size = 4")),
    "no such cache": ("grpo", {"sampling.cache": "int4"}, ("config.sampling.cache", "'int4'", "int8")),
    "odd groups of pairs": (
        "xpo", {"run.batch_size": 12, "sampling.group_size": 3, "run.microbatches": 1}, ("config.sampling.group_size", "3", "even")),
    "pairs do not divide": ("online_dpo", {"run.microbatches": 8}, ("config.run.batch_size", "8", "4 pairs", "= 8")),
    "pairs and devices": ("nash_md", {"mesh.data": 8, "mesh.devices": 8, "run.microbatches": 1}, ("config.run.batch_size", "4 pairs", "8 devices")),
    "pairs and what is left": ("nash_md", {"mesh.data": -1, "mesh.devices": 8, "run.microbatches": 1}, ("config.run.batch_size", "8 devices")),
    "mesh too small": ("sft", {"mesh.devices": 2}, ("config.mesh", "2 devices")),
    "mesh too large": ("sft", {"mesh.devices": 99}, ("config.mesh.devices", "99", "8")),
    "mesh twice what is left": ("sft", {"mesh.data": -1, "mesh.fsdp": -1}, ("config.mesh", "-1")),
    "rows and their devices": ("sft", {"mesh.sequence": 3, "mesh.devices": 3}, ("config.data.max_length = 64", "config.mesh.sequence = 3")),
    "rollouts and their devices": ("grpo", {"mesh.sequence": 5, "mesh.devices": 5}, ("config.sampling.max_new_tokens = 56", "sequence = 5")),
    "mesh and model": ("sft", {"mesh.tensor": 3, "mesh.devices": 3}, ("config.mesh.tensor", "3", "divide")),
    "vocabulary": ("sft", {"model.vocab_size": 100}, ("config.model.vocab_size", "100", "262")),
    "row longer than the context": ("sft", {"data.max_length": 256}, ("config.data.max_length", "256", "config.model.context")),
    "rollout longer than the context": ("ppo", {"sampling.max_new_tokens": 256}, ("config.sampling.max_new_tokens", "256", "128")),
    "no such filter": ("ppo", {"sampling.filters": ({"name": "min_q", "p": 0.1},)}, ("config.sampling.filters[0].name", "'min_q'", "min_p")),
    "filter of no token": ("ppo", {"sampling.filters": ({"name": "allowed", "ids": (999,)},)}, ("config.sampling.filters[0]", "999", "264")),
    "more tokens at least than at most": ("ppo", {"sampling.filters": ({"name": "min_new_tokens", "tokens": 999},)},
                                          ("config.sampling.filters[0].tokens = 999", "config.sampling.max_new_tokens")),
    "temperature beyond float32": ("ppo", {"sampling.temperature": 1e-39}, ("config.sampling.temperature", "1e-39", "1e-06")),
    "nobody's parameters": ("ppo", {"env.parameters": {"role": "user"}}, ("config.env.parameters", "'role'", "config.env.name = ''")),
    "stop string of no text": ("ppo", {"sampling.stop_strings": ("<|end|>",)}, ("config.sampling.stop_strings", "'<|end|>'", "control token")),
    "dropout online": ("ppo", {"model.dropout": 0.1}, ("config.model.dropout", "0.1")),
    "inherit from nothing": ("sft", {"tokenizer.kind": "inherit"}, ("config.tokenizer.kind", "config.init_from")),
    "no tokenizer file": ("sft", {"tokenizer.kind": "file", "tokenizer.path": "/none.json"}, ("config.tokenizer.path", "/none.json")),
    "small bpe": ("sft", {"tokenizer.kind": "bpe", "tokenizer.vocab_size": 10}, ("config.tokenizer.vocab_size", "10", "262")),
    "no such template": ("sft", {"data.template": "plan"}, ("config.data.template", "'plan'", "plain")),
    "trainable is no pattern": ("sft", {"trainable": "("}, ("config.trainable", "'('")),
    "trainable matches nothing": ("sft", {"trainable": "attention2"}, ("config.trainable", "attention2")),
    "validation without a file": ("sft", {"data.valid": ""}, ("config.validation.every", "config.data.valid")),
    "metric not measured": ("sft", {"validation.metric": "eval/loss/nl"}, ("config.validation.metric", "eval/loss/nll")),
    "metric not measured online": ("ppo", {"validation.metric": "eval/score"}, ("config.validation.metric", "eval/objective/score")),
    "wandb not installed": ("sft", {"log.wandb": "project"}, ("config.log.wandb", "install")),
    "packed pairs": ("dpo", {"data.pack": True}, ("config.data.pack", "preference")),
    "packed feedback": ("kto", {"data.pack": True}, ("config.data.pack", "feedback")),
    "dpo on rankings": ("dpo", {"data.kind": "ranking"}, ("config.data.kind", "'ranking'", "dpo trains on preference data")),
    "reward on rankings": ("reward", {"data.kind": "ranking"}, ("config.data.kind", "'ranking'", "reward trains on preference data")),
    "rankings on ratings": ("plackett_luce", {"data.kind": "rating"}, ("config.data.kind", "trains on ranking or preference data")),
    "kto on pairs": ("kto", {"data.kind": "preference"}, ("config.data.kind", "'preference'", "kto trains on feedback data")),
    "verdicts on ratings": ("process_reward", {"data.kind": "rating"}, ("config.data.kind", "process_reward trains on stepwise data")),
    "ratings on verdicts": ("pointwise", {"data.kind": "stepwise"}, ("config.data.kind", "pointwise trains on rating data")),
    "unknown objective": ("sft", {"objective.name": "stf"}, ("config.objective.name", "'stf'", "sft")),
    "unknown module": ("sft", {"objective.name": "nowhere.mine"}, ("config.objective.name", "'nowhere.mine'")),
    "unknown hyper-parameter": ("dpo", {"objective.betta": 0.1}, ("config.objective.betta", "beta")),
    "hyper-parameter left out": ("dpo", {"objective.beta": ABSENT}, ("config.objective", "beta")),
    "hyper-parameter's type": ("dpo", {"objective.beta": "0.1"}, ("config.objective.beta", "'0.1'", "float")),
    "sft on prompts": ("sft", {"data.kind": "prompt"}, ("config.data.kind", "'prompt'", "demo")),
    "sft on pairs": ("sft", {"data.kind": "preference"}, ("config.data.kind", "'preference'", "demo")),
    "ppo on demonstrations": ("ppo", {"data.kind": "demo"}, ("config.data.kind", "'demo'", "prompt")),
    "reward objective on a policy": ("reward", {"network": "policy"}, ("config.network", "reward")),
    "sft on a reward model": ("sft", {"network": "reward"}, ("config.network", "policy")),
    "ppo on a reward model": ("ppo", {"network": "reward"}, ("config.network", "'reward'")),
    "dpo without a reference": ("dpo", {"reference_from": ""}, ("config.reference_from",)),
    "ppo without a critic": ("ppo", {"critic.kind": "none"}, ("config.critic.kind", "'none'")),
    "an opponent's log-probs as the policy's": ("nash_md", {"sampling.old_logps": "sampler"}, ("config.sampling.old_logps", "'sampler'", "trainer")),
    "no reward": ("ppo", {"reward_fn": ""}, ("config.reward_from", "config.reward_fn")),
    "a reward that nobody reads": ("on_policy_gkd", {"reward_fn": "rlhf_jax.rewards.rules.brevity"}, ("config.reward_fn", "reads no score")),
    "distillation without a teacher": ("gkd", {"reference_from": ""}, ("config.reference_from", "gkd learns from a teacher")),
    "no second data set": ("ppo_ptx", {"ptx": ABSENT}, ("config.ptx is missing", "ppo_ptx", "max_length")),
    "second data set that nobody reads": ("ppo_ptx", {"objective.ptx_coef": 0.0}, ("config.ptx", "take the section out")),
    "typo in the second data set": ("ppo_ptx", {"ptx.packed": True}, ("config.ptx.packed", "pack")),
    "second data set without a file": ("ppo_ptx", {"ptx.train": ""}, ("config.ptx.train", "empty")),
    "no such second data set": ("ppo_ptx", {"ptx.train": "/none.jsonl"}, ("config.ptx.train", "/none.jsonl")),
    "second data set of another kind": ("ppo_ptx", {"ptx.kind": "preference"}, ("config.ptx.kind", "'preference'", "demo")),
    "second data set longer than the context": ("ppo_ptx", {"ptx.max_length": 256}, ("config.ptx.max_length", "256", "128")),
    "reward function misspelt": ("ppo", {"reward_fn": "rlhf_jax.rewards.rules.brevty"}, ("config.reward_fn", "'brevty'", "brevity")),
    "two kinds of reward": ("ppo", {"rewards": ({"name": "rules.brevity"},)}, ("config.reward_fn", "config.rewards", "exactly one")),
    "rewards that nobody reads": ("on_policy_gkd", {"rewards": ({"name": "rules.brevity"},)}, ("config.rewards", "reads no score", "set it to ()")),
    "no such reward": ("ppo", {"reward_fn": "", "rewards": ({"name": "rules.brevty"},)}, ("config.rewards[0]", "'rules.brevty'", "brevity")),
    "no such reward in short": ("ppo", {"reward_fn": "rules.brevty"}, ("config.reward_fn", "'rules.brevty'", "brevity")),
    "no such reward run": ("ppo", {"reward_fn": "", "rewards": ({"name": "learned", "run": "/none"},)}, ("config.rewards[0].run", "/none")),
    "no such policy on failure": ("ppo", {"reward_failure.policy": "skip"}, ("config.reward_failure.policy", "'skip'", "mask")),
    "default that is no number": ("ppo", {"reward_failure.default": float("nan")}, ("config.reward_failure.default", "nan")),
    "negative timeout": ("ppo", {"reward_failure.timeout": -1.0}, ("config.reward_failure.timeout", "-1.0")),
    "reward module missing": ("ppo", {"reward_fn": "nowhere.reward"}, ("config.reward_fn", "'nowhere.reward'")),
    "no such checkpoint": ("sft", {"init_from": "/none"}, ("config.init_from", "/none")),
    "no such critic": ("ppo", {"critic.init_from": "/none"}, ("config.critic.init_from", "/none")),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_config(mistake: str, tmp_path: pathlib.Path) -> None:
    name, changes, said = CONFIG_MISTAKES[mistake]
    refused(changed(name, changes), tmp_path / "run", *said)


FILES: dict[str, tuple[str, list[Any], int | None, tuple[str, ...]]] = {
    "empty": ("sft", [], 1, ("empty file",)),
    "not JSON": ("sft", [ANSWERED, '{"prompt": '], 2, ("valid JSON",)),
    "not an object": ("sft", [ANSWERED, ANSWERED, "[1]"], 3, ("JSON object",)),
    "not UTF-8": ("sft", [b'{"prompt": "\xff"}'], 1, ("UTF-8",)),
    "wrong type": ("sft", [{"prompt": "2 + 2?", "completion": 4}], 1, ("completion", "4")),
    "missing field": ("sft", [{"question": "2 + 2?"}], 1, ("messages", "question")),
    "missing branch": ("dpo", [PAIR, {"prompt": "2 + 2?", "chosen": "4"}], 2, ("rejected",)),
    "margin": ("reward", [{**PAIR, "margin": "much"}], 1, ("margin", "much")),
    "no loss tokens": ("sft", [ANSWERED, {"messages": [{"role": "user", "content": "2 + 2?"}]}], 2, ("messages", "assistant")),
    "prompt fills the context": ("sft", [ANSWERED, {"prompt": "2" * 80, "completion": "4"}], 2, ("prompt", "64", "config.data.max_length")),
    "prompt fills a pair": ("dpo", [{**PAIR, "prompt": "2" * 80}], 1, ("prompt", "64", "config.data.max_length")),
    "label": ("kto", [{"prompt": "2 + 2?", "completion": "4", "label": "yes"}], 1, ("label", "'yes'", "true or false")),
    "tied ranking": ("plackett_luce", [{"prompt": "2 + 2?", "completions": ["4", "5"], "scores": [1, 1]}], 1, ("scores", "differ")),
    "rating": ("pointwise", [{"prompt": "2 + 2?", "completion": "4"}], 1, ("score", "nothing", "finite number")),
    "unlabelled step": ("process_reward", [{"prompt": "2 + 2?", "completions": ["2", "4"], "labels": [True]}], 1, ("labels", "2 labels")),
    "prompt too long": ("ppo", [{"prompt": "2 + 2?"}, {"prompt": "2" * 80}], 2, ("prompt", "48", "config.data.prompt_length")),
    "prompt that is answered": ("grpo", [{"prompt": [{"role": "assistant", "content": "4"}]}], 1, ("prompt", "user message")),
}


@pytest.mark.parametrize("key", ["train", "valid"])
@pytest.mark.parametrize("mistake", FILES)
def test_data_file(mistake: str, key: str, tmp_path: pathlib.Path) -> None:
    name, content, line, said = FILES[mistake]
    path = write_rows(tmp_path / "rows.jsonl", content)
    cache = {"data.cache": str(tmp_path / "cache")}
    refused(changed(name, {f"data.{key}": path, **cache}), tmp_path / "run", f"{path}:{line}", *said)
    prepared = [found.name for found in (tmp_path / "cache").glob("*")] if (tmp_path / "cache").exists() else []
    assert not [entry for entry in prepared if entry.startswith(".")], "a half-built data set was left"
    assert len(prepared) == (key == "valid"), prepared  # the training set was good


@pytest.mark.parametrize("key", ["train", "valid"])
def test_data_path(key: str, tmp_path: pathlib.Path) -> None:
    refused(changed("sft", {f"data.{key}": str(tmp_path / "none.jsonl")}), tmp_path / "run", f"config.data.{key}", "none.jsonl")
    (tmp_path / "folder").mkdir()
    refused(changed("sft", {f"data.{key}": str(tmp_path / "folder")}), tmp_path / "run", str(tmp_path / "folder"), ".jsonl")
    text = shutil.copy(sample_file("demo"), tmp_path / "demo.txt")
    refused(changed("sft", {f"data.{key}": str(text)}), tmp_path / "run", "demo.txt", ".jsonl")


CHECKPOINT_MISTAKES: dict[str, tuple[str, dict[str, str], str, tuple[str, ...]]] = {
    "another model": ("sft", {"init_from": "wider"}, "config.init_from", ("hidden 32", "config.model has 16")),
    "another tokenizer": ("sft", {"init_from": "bpe"}, "config.init_from", ("config.tokenizer.kind", "inherit")),
    "policy from a reward model": ("sft", {"init_from": "reward"}, "config.init_from", ("reward model",)),
    "ppo policy from a reward model": ("ppo", {"init_from": "reward"}, "config.init_from", ("reward model",)),
    "reference from a reward model": ("dpo", {"reference_from": "reward"}, "config.reference_from", ("reward model",)),
    "reference of another tokenizer": ("dpo", {"reference_from": "bpe"}, "config.reference_from", ("tokenizer",)),
    "reward from a policy": ("ppo", {"reward_from": "sft"}, "config.reward_from", ("policy",)),
    "reward without moments": ("ppo", {"reward_from": "reward_unmeasured"}, "config.reward_from", ("reward_normalise", "reward_mean")),
    "critic of another tokenizer": ("ppo", {"critic.init_from": "bpe"}, "config.critic.init_from", ("tokenizer",)),
}


@pytest.mark.parametrize("mistake", CHECKPOINT_MISTAKES)
def test_checkpoint_that_does_not_fit(mistake: str, finished: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sources, key, said = CHECKPOINT_MISTAKES[mistake]
    changes: dict[str, Any] = {where: str(finished(run)) for where, run in sources.items()}
    if "reward_from" in changes:
        changes |= {"reward_fn": "", "reward_normalise": True}
    _forbid_training(monkeypatch)
    refused(changed(name, changes), tmp_path / "run", key, *said)


def test_two_rewards(finished: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(finished("reward"))
    _forbid_training(monkeypatch)
    refused(changed("ppo", {"reward_from": source}), tmp_path / "run", "config.reward_from", "config.reward_fn")


@pytest.mark.parametrize("damage", ["flipped bit", "torn file", "manifest"])
def test_damaged_checkpoint(damage: str, finished: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    shutil.copytree(finished("sft"), source)
    step = max((source / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    files = [path for path in (step / "params").rglob("*") if path.is_file() and "/d/" in str(path)]
    if damage == "manifest":
        (step / "meta" / "metadata").write_text('{"step"')
    else:
        largest = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content[: len(content) // 3] if damage == "torn file" else content)
    _forbid_training(monkeypatch)
    before = snapshot(source)
    refused(changed("dpo", {"init_from": str(source)}), tmp_path / "run", "config.init_from", str(step), "damaged")
    assert snapshot(source) == before, "another run's checkpoint was touched"


def test_folder_without_a_checkpoint(tmp_path: pathlib.Path) -> None:
    refused(changed("sft", {"init_from": str(tmp_path)}), tmp_path / "run", "config.init_from", str(tmp_path), "checkpoint")


@pytest.mark.parametrize(("key", "value"), [("optimizer.lr", 2e-3), ("run.steps", 8), ("seed", 1), ("model.scan_layers", True)])
def test_another_config_in_the_workdir(key: str, value: Any, finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = finished("sft")
    _forbid_training(monkeypatch)
    refused(tiny("sft", {key: value}), workdir, f"config.{key}", repr(value), "--workdir")


def test_workdir_that_is_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--workdir.* is a file"):
        train(tiny("sft"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
