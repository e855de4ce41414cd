"""Saved networks as later runs want them: more tokens, adapters on a base, heads that a network lacks."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoint, distributed
from rlhf_jax.data.hf_tokenizer import add_tokens
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models.adopt import DRAWN, adopt, missing
from rlhf_jax.models.lazy import Lazy
from rlhf_jax.saved import Source, load_source, place
from rlhf_jax.train.loop import train
from tests.models import tiny
from tests.train.runs import tiny as run_config

GOLDEN = pathlib.Path(__file__).parent / "models" / "families" / "golden"
BYTE = Tokenizer.byte_level()


def source(**changes) -> Source:
    config = tiny.config(vocab_size=BYTE.vocab_size + 3, **changes)
    params = jax.tree.map(np.asarray, tiny.params(config))
    return Source("here", "/here", "policy", config, params, {}, BYTE, None)


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_take_padding_rows_first_and_start_as_the_mean_of_the_others(tied):
    before = source(tied=tied)
    more = add_tokens(BYTE, [f"<|{i}|>" for i in range(5)]).tokenizer
    after = before.with_tokens(more)
    assert after.config.vocab_size == BYTE.vocab_size + 5 == more.vocab_size
    for name, axis in (("embedding", 0), *([] if tied else [("lm_head", 1)])):
        old, new = (np.moveaxis(np.asarray(s.params["ends"][name]), axis, 0) for s in (before, after))
        np.testing.assert_array_equal(new[: BYTE.vocab_size], old[: BYTE.vocab_size])
        np.testing.assert_allclose(new[BYTE.vocab_size :], np.broadcast_to(old[: BYTE.vocab_size].mean(0), (5, 16)), rtol=1e-4, atol=1e-6)
    fewer = before.with_tokens(add_tokens(BYTE, ["<|0|>"]).tokenizer)
    assert fewer.config.vocab_size == before.config.vocab_size, "the table was padded already"
    np.testing.assert_array_equal(np.asarray(fewer.params["ends"]["embedding"])[-2:], before.params["ends"]["embedding"][-2:])
    placed = place(after.params, after.config, distributed.make_mesh({}, 1))
    assert placed["ends"]["embedding"].shape[0] == more.vocab_size


def test_adopt_takes_what_is_there_and_marks_what_is_not():
    reward = tiny.config(outputs=("score",))
    critic = tiny.config(outputs=("value",))
    loaded = jax.tree.map(np.asarray, tiny.params(reward))
    found = adopt(jax.eval_shape(lambda: tiny.params(critic)), loaded, critic)
    assert found["ends"]["value_head"]["kernel"] is loaded["ends"]["score_head"]["kernel"] and missing(found) == ["ends/value_head/bias"]
    assert found["ends"]["value_head"]["bias"] is DRAWN
    with pytest.raises(UserError, match="lacks parameters of the network: ends/value_head/bias"):
        place(loaded, critic, distributed.make_mesh({}, 1))
    with pytest.raises(UserError, match=r"layers/0/key/kernel has shape \(16, 8\), and the network wants \(16, 16\)"):
        adopt(jax.eval_shape(lambda: tiny.params(tiny.config(head_dim=8))), jax.tree.map(np.asarray, tiny.params()), critic)
    biased = tiny.config(qkv_bias=True)
    with pytest.raises(UserError, match="layers/0/key/bias, which the network has not"):
        adopt(jax.eval_shape(lambda: tiny.params(tiny.BASE)), jax.tree.map(np.asarray, tiny.params(biased)), tiny.BASE)


def test_a_directory_without_a_tokenizer_serves_token_ids_and_says_so_where_text_is_wanted():
    opened = load_source(str(GOLDEN / "llama"), "--model")
    assert opened.network == "policy" and opened.tokenizer is None and all(isinstance(x, Lazy) for x in jax.tree.leaves(opened.params))
    with pytest.raises(UserError, match=r"--model = '.*llama' has no tokenizer\.json"):
        opened.reader("--model")
    with pytest.raises(UserError, match="has no chat template: it is a base model"):
        opened.layout("--model")
    assert load_source(str(GOLDEN / "llama_score"), "--model").network == "reward"


def test_adapters_are_saved_alone_and_come_back_with_their_base(tmp_path):
    train(run_config("sft", {"run.steps": 1}), str(tmp_path / "base"))
    lora = {"init_from": str(tmp_path / "base"), "tokenizer.kind": "inherit", "lora.rank": 2, "run.steps": 2}
    train(run_config("sft", lora), str(tmp_path / "tuned"))
    saved, meta = checkpoint.load_params(str(tmp_path / "tuned"), key="x")
    names = {path for path in tiny.canonical(saved)}
    assert names and all(path.endswith(("['lora_a']", "['lora_b']")) for path in names)
    assert meta["base"] == str((tmp_path / "base" / "checkpoints" / "1").resolve())
    whole, base = load_source(str(tmp_path / "tuned"), "x"), load_source(str(tmp_path / "base"), "x")
    kernels = {path: leaf for path, leaf in tiny.canonical(whole.params).items() if "lora" not in path}
    assert kernels.keys() == tiny.canonical(base.params).keys()
    assert all(np.array_equal(leaf, tiny.canonical(base.params)[path]) for path, leaf in kernels.items())
    merged = whole.for_adapters(None)
    assert merged.config == dataclasses.replace(base.config) and merged.config.lora is None
    again = {**lora, "init_from": str(tmp_path / "tuned"), "lora.rank": 0, "run.steps": 1, "optimizer.lr": 1e-30}
    train(run_config("sft", again), str(tmp_path / "full"))
    full = tiny.canonical(load_source(str(tmp_path / "full"), "x").params)
    for path, leaf in tiny.canonical(jax.tree.map(np.asarray, merged.params)).items():
        np.testing.assert_allclose(full[path], leaf, atol=1e-6)
    last = tmp_path / "base" / "checkpoints" / "1"
    shutil.move(last, tmp_path / "kept")
    train(run_config("sft", {"run.steps": 1, "seed": 1}), str(tmp_path / "other"))
    shutil.copytree(tmp_path / "other" / "checkpoints" / "1", last)
    with pytest.raises(UserError, match="whose weights have changed since they were trained"):
        load_source(str(tmp_path / "tuned"), "x")
    with pytest.raises(UserError, match=r"config\.init_from = '.*base': its weights are not those that this run was started from"):
        train(run_config("sft", lora), str(tmp_path / "tuned"))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=r"x = '.*tuned' holds adapters for '.*base/checkpoints/1', which cannot be opened"):
        load_source(str(tmp_path / "tuned"), "x")


def test_scanned_layers_start_on_a_checkpoint_with_adapters_and_a_reward_model_leaves_its_base_s_head(tmp_path):
    """Fresh adapters of several layers are drawn as one stack; an untied policy's output matrix is no part of the reward model on it."""
    two = {"model.layers": 2, "model.tied": False}
    train(run_config("sft", {**two, "run.steps": 1}), str(tmp_path / "base"))
    lora = {**two, "init_from": str(tmp_path / "base"), "tokenizer.kind": "inherit", "lora.rank": 2, "run.steps": 2, "model.scan_layers": True}
    train(run_config("reward", lora), str(tmp_path / "tuned"))
    found = load_source(str(tmp_path / "tuned"), "x")
    assert found.params["ends"].keys() == {"embedding", "norm", "score_head"}
    assert found.params["layers"]["1"]["query"].keys() == {"kernel", "lora_a", "lora_b"}
    assert not np.array_equal(*(np.asarray(found.params["layers"][i]["query"]["lora_a"]) for i in "01"))


def test_adapters_and_heads_that_a_run_drew_and_froze_are_saved_with_those_that_train(tmp_path):
    """No other checkpoint has them: a run that trains half of its adapters is a whole network all the same, and goes on as it began."""
    train(run_config("sft", {"run.steps": 1}), str(tmp_path / "base"))
    lora = {"init_from": str(tmp_path / "base"), "tokenizer.kind": "inherit", "lora.rank": 2, "lora.dora": True, "trainable": "lora_b",
            "run.steps": 2}
    first = train(run_config("reward", lora), str(tmp_path / "tuned"))
    found = load_source(str(tmp_path / "tuned"), "x")
    place(found.params, found.config, distributed.make_mesh({}, 1))
    assert found.for_adapters(None).params["layers"]["0"]["query"]["kernel"].shape == found.params["layers"]["0"]["query"]["kernel"].shape
    assert found.params["ends"]["score_head"]["kernel"].any() and found.params["layers"]["0"]["query"]["lora_b"].any()
    shutil.rmtree(tmp_path / "tuned" / "checkpoints" / "2")
    assert train(run_config("reward", lora), str(tmp_path / "tuned")).state_hash == first.state_hash
