"""Training that begins at a Hugging Face directory: every key that names one, tokens added, architectures inherited, and the way back."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rlhf_jax import distributed
from rlhf_jax.data import hf_tokenizer
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import families
from rlhf_jax.models.hf.export import write_directory
from rlhf_jax.saved import load_source, place
from rlhf_jax.train.loop import train
from tests.cli.saved import config as model_of
from tests.cli.saved import draw
from tests.models import tiny as models
from tests.train.runs import metrics, outcome, steps, tiny

GEMMA = dict(family="gemma2", layers=2, windows=(5, 0), tied=True, scaled_embedding=True, norm_offset=True, norm_placement="both",
             activation="gelu_tanh", attention_softcap=50.0, logits_softcap=30.0, attention_scale=0.25)
INHERIT = {"model.family": "inherit", "tokenizer.kind": "inherit", "data.template": "inherit", "model.context": 96}
BYTE = Tokenizer.byte_level()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A policy and a reward model of Gemma 2's form that read bytes, as Hugging Face directories."""
    root = tmp_path_factory.mktemp("hf")
    text = hf_tokenizer.files(BYTE, ChatTemplate.load("plain", variables=BYTE.variables), model_max_length=200)
    for seed, network in enumerate(("policy", "reward")):
        config = model_of(network, **GEMMA)
        write_directory(
            root / network, families.load("gemma2").ROWS, config, draw(config, seed), dtype="float32",
            config_json=families.write(config, 200) | {"eos_token_id": BYTE.end_id, "pad_token_id": BYTE.pad_id, "bos_token_id": BYTE.bos_id},
            extra_files={name: content.encode() for name, content in text.items()},
        )
    return lambda name: str(root / name)


def test_a_run_takes_architecture_tokenizer_and_template_from_the_directory(directories, tmp_path: pathlib.Path) -> None:
    changes = {"init_from": directories("policy"), **INHERIT}
    train(tiny("sft", changes), str(tmp_path / "run"))
    before, after = load_source(directories("policy"), "x"), load_source(str(tmp_path / "run"), "x")
    assert after.config.difference(before.config) == [] and after.config.windows == (5, 0) and after.config.hidden == 16
    assert after.meta["longest"] == 200 and after.tokenizer.reads_like(before.tokenizer) and after.template.source == before.template.source
    for path, leaf in models.canonical(after.params).items():
        moved = np.abs(leaf - models.canonical(before.params)[path]).max()
        assert 0 < moved < 0.1, path
    shutil.copytree(tmp_path / "run", tmp_path / "part")
    last = max(steps(tmp_path / "part" / "checkpoints"))
    shutil.rmtree(tmp_path / "part" / "checkpoints" / str(last))  # as if it had been killed before
    (tmp_path / "part" / "final.json").unlink()
    train(tiny("sft", changes), str(tmp_path / "part"))
    assert outcome(tmp_path / "part") == outcome(tmp_path / "run")


@pytest.mark.slow
def test_reference_reward_and_critic_from_directories(directories, tmp_path: pathlib.Path) -> None:
    changes = {"init_from": directories("policy"), "reference_from": directories("policy"), "reward_from": directories("reward"), "reward_fn": "",
               "critic.kind": "separate", "critic.init_from": directories("reward"), "run.steps": 1, "run.epochs": 1, "run.minibatches": 1, **INHERIT}
    train(tiny("ppo", changes), str(tmp_path))
    (line,) = [row for row in metrics(tmp_path) if "objective/score" in row]
    assert abs(line["objective/kl"]) < 1e-4, "the policy is its reference at first"
    assert line["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)


def test_the_first_loss_is_the_directorys_own(directories, tmp_path: pathlib.Path) -> None:
    """The step's first loss, on the shards of eight devices, is what the imported network says of the same rows."""
    changes = {"init_from": directories("policy"), "run.steps": 1, "run.microbatches": 1, **INHERIT, "mesh.fsdp": 2, "mesh.tensor": 2,
               "mesh.devices": 4}
    with models.uncached():
        train(tiny("sft", changes), str(tmp_path / "sharded"))
    train(tiny("sft", {**changes, "mesh.fsdp": 1, "mesh.tensor": 1, "mesh.devices": 1}), str(tmp_path / "one"))
    sharded, one = (next(row["loss/nll"] for row in metrics(tmp_path / name) if "loss/nll" in row) for name in ("sharded", "one"))
    assert sharded == pytest.approx(one, rel=1e-5)


def test_added_tokens_are_trained_saved_and_exported(directories, tmp_path: pathlib.Path) -> None:
    changes = {"init_from": directories("policy"), **INHERIT, "model.add_tokens": ("<|tool|>", "<|call|>", "<|done|>", "<|end|>"), "run.steps": 1}
    train(tiny("sft", changes), str(tmp_path))
    run = load_source(str(tmp_path), "x")
    assert run.tokenizer.vocab_size == BYTE.vocab_size + 3 == run.config.vocab_size, "<|end|> was there already"
    assert run.tokenizer.encode("<|call|>")[0].tolist() == [263]
    table = place(run.params, run.config, distributed.make_mesh({}, 1))["ends"]["embedding"]
    assert table.shape == (265, 16) and np.isfinite(np.asarray(table)).all()


def test_tables_with_new_tokens_train_beside_adapters(directories, tmp_path: pathlib.Path) -> None:
    """Else the new rows would stay one and the same."""
    changes = {"init_from": directories("policy"), **INHERIT, "model.add_tokens": ("<|call|>", "<|done|>"), "lora.rank": 2, "run.steps": 2}
    train(tiny("sft", changes), str(tmp_path))
    run, before = load_source(str(tmp_path), "x"), load_source(directories("policy"), "x")
    table = np.asarray(run.params["ends"]["embedding"])
    assert table.shape[0] == 264 and np.abs(table[:262] - np.asarray(before.params["ends"]["embedding"])[:262]).max() > 0
    np.testing.assert_array_equal(run.params["layers"]["0"]["query"]["kernel"], before.params["layers"]["0"]["query"]["kernel"])


def test_a_reference_at_the_start_knows_the_added_tokens(directories, tmp_path: pathlib.Path) -> None:
    """Beside fresh adapters the tables train; the reference keeps them as they were. A policy that has not moved yet is its own reference."""
    changes = {"init_from": directories("policy"), **INHERIT, "model.add_tokens": ("<|call|>", "<|done|>"), "lora.rank": 2, "run.steps": 2,
               "reference_from": "init"}
    train(tiny("dpo", changes), str(tmp_path))
    rows = [row for row in metrics(tmp_path) if "loss/dpo" in row]
    assert rows[0]["loss/dpo"] == pytest.approx(np.log(2), abs=1e-6) and abs(rows[-1]["loss/dpo"] - np.log(2)) > 1e-6


def _changed(directories: Any, tmp_path: pathlib.Path) -> tuple[pathlib.Path, Callable[[], None]]:
    """A copy of the policy's directory, and what changes its last weight."""
    folder = tmp_path / "model"
    shutil.copytree(directories("policy"), folder)
    (folder / "SHA256SUMS").unlink()

    def change() -> None:
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-2] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    return folder, change


@pytest.mark.parametrize("adapters", [False, True])
def test_a_run_that_holds_all_its_weights_goes_on_without_its_start(directories, tmp_path: pathlib.Path, adapters: bool) -> None:
    folder, change = _changed(directories, tmp_path)
    config = tiny("sft", {"init_from": str(folder), **INHERIT, "lora.rank": 2 if adapters else 0, "run.steps": 1})
    first = train(config, str(tmp_path / "run"))
    change()
    if adapters:  # the base is read from it
        with pytest.raises(UserError, match="its weights are not those that this run was started from"):
            train(config, str(tmp_path / "run"))
    else:
        assert train(config, str(tmp_path / "run")).state_hash == first.state_hash


def test_a_directory_that_changed_is_told_apart(directories, tmp_path: pathlib.Path) -> None:
    folder, change = _changed(directories, tmp_path)
    before = load_source(str(folder), "x").meta["fingerprint"]
    change()
    assert load_source(str(folder), "x").meta["fingerprint"] != before == load_source(directories("policy"), "x").meta["fingerprint"]


@pytest.mark.parametrize(("changes", "said"), [
    ({"model.family": "llama"}, r"config\.init_from = '.*policy' is a checkpoint of another model: family gemma2 \(config\.model has llama\).*"
                                r"set config\.model\.family = 'inherit'"),
    ({"model.family": "lama"}, r"config\.model\.family = 'lama' is not a family of models.*llama"),
    ({"init_from": ""}, r"config\.tokenizer\.kind = 'inherit' needs config\.init_from|config\.model\.family = 'inherit' needs config\.init_from"),
    ({"model.add_tokens": ("",)}, r"config\.model\.add_tokens = \('',\): must be a tuple of strings"),
    ({"lora.targets": "qurey", "lora.rank": 2}, r"config\.lora\.targets = 'qurey'"),
    ({"lora.base": "nf4", "lora.rank": 2}, r"nf4"),
])
def test_mistakes_are_one_sentence(directories, tmp_path: pathlib.Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(tiny("sft", {"init_from": directories("policy"), **INHERIT, **changes}), str(tmp_path))


def test_a_directory_of_another_vocabulary_is_refused_unless_tokens_are_added(directories, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    config = model_of(vocab_size=259)
    text = hf_tokenizer.files(BYTE, None, model_max_length=200)
    ids = {"eos_token_id": BYTE.end_id, "bos_token_id": BYTE.bos_id}
    write_directory(folder, families.load("llama").ROWS, config, draw(config), dtype="float32", config_json=families.write(config, 200) | ids,
                    extra_files={name: content.encode() for name, content in text.items()})
    changes = {"init_from": str(folder), **INHERIT, "data.template": "plain", "run.steps": 1}
    with pytest.raises(UserError, match=r"id 261, and the model's vocab_size is 259.*add_tokens"):
        train(tiny("sft", changes), str(tmp_path / "run"))
    train(tiny("sft", {**changes, "model.add_tokens": ("<|call|>",)}), str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "final.json").read_text())["stopped"] == "finished"
    assert load_source(str(tmp_path / "run"), "x").config.vocab_size == 263
