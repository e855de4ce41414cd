"""Every family against the transformers that is installed (extra `conformance`), on models drawn afresh, both ways: imported, and exported again."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_jax.models import ModelConfig, families, layout, transformer
from rlhf_jax.saved import load_source
from rlhf_jax.types import PyTree
from tests.models import tiny
from tests.models.families import golden, reference_models
from tests.models.families.test_golden import scores

SEED = 7
BATCH = reference_models.rows(SEED)
REAL = BATCH["segment_ids"] != 0
CONTINUED = [name for name, (_, task, _) in reference_models.VARIANTS.items() if task == "lm"]
FAMILIES = list({reference_models.VARIANTS[name][0]: name for name in reversed(CONTINUED)}.values())


def opened(folder: Any) -> tuple[Any, ModelConfig, PyTree]:
    source = load_source(str(folder), "--model")
    config = dataclasses.replace(source.config, scan_layers=False, logits_chunk=0)
    return source, config, jax.tree.map(np.asarray, source.params)


def loaded(factory: Any, folder: Any) -> Any:
    """An export in transformers, which found each of its keys and no other."""
    model, report = factory.from_pretrained(folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def close(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_allclose(one, other, rtol=0, atol=golden.TOLERANCE)


@pytest.mark.parametrize("name", CONTINUED)
def test_a_language_model_comes_in_and_goes_out(name, tmp_path):
    model = reference_models.build(name, SEED)
    model.save_pretrained(tmp_path / "theirs")
    want = reference_models.logits(model, BATCH)

    source, config, params = opened(tmp_path / "theirs")
    close(np.asarray(tiny.logits(config, params, golden.rows(BATCH)))[REAL], want[REAL])

    golden.export(tmp_path / "ours", source.config, source.params, source.meta["longest"])
    again = loaded(AutoModelForCausalLM, tmp_path / "ours")
    assert type(again) is type(model)
    np.testing.assert_array_equal(reference_models.logits(again, BATCH), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_model_comes_in_and_goes_out(name, tmp_path):
    model = reference_models.build(name, SEED, "score")
    model.save_pretrained(tmp_path / "theirs")
    want = reference_models.scores(model, BATCH)

    source, config, params = opened(tmp_path / "theirs")
    assert source.network == "reward"
    got = np.asarray(scores(config, params, golden.rows(BATCH)))
    close(got[np.arange(6), golden.last(BATCH["segment_ids"])[:6]], want)

    golden.export(tmp_path / "ours", source.config, source.params, source.meta["longest"])
    again = loaded(AutoModelForSequenceClassification, tmp_path / "ours")
    assert type(again) is type(model)
    again.config.pad_token_id = 0  # which an export without a tokenizer does not know
    np.testing.assert_array_equal(reference_models.scores(again, BATCH), want)


@pytest.mark.parametrize("name", ["llama_biases", "mixtral"])
def test_a_model_in_bfloat16_and_in_shards_comes_in(name, tmp_path):
    model = reference_models.build(name, SEED).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    _, config, params = opened(tmp_path)
    assert config.param_dtype == "bfloat16"
    want = reference_models.logits(loaded(AutoModelForCausalLM, tmp_path), BATCH)  # loaded anew: `bfloat16()` has rounded the rotary frequencies too
    close(np.asarray(tiny.logits(config, params, golden.rows(BATCH)))[REAL], want[REAL])


@pytest.mark.parametrize("family", families.names())
def test_a_network_made_here_is_one_in_transformers(family, tmp_path):
    """Of the family's own form and of no config.json's sizes; every parameter moved off its first value."""
    config = dataclasses.replace(tiny.BASE, **families.fresh(family), family=family, vocab_size=reference_models.V, context=64)
    heads = dict(kv_heads=config.heads) if family in ("gpt2", "gpt_neox") else {}
    learned = dict(positions=64) if config.position == "learned" else {}
    experts = dict(experts=5, experts_per_token=2, expert_mlp=24) if "balance_coef" in families.fresh(family) else {}
    config = dataclasses.replace(config, layers=3, **heads, **learned, **experts)
    params = tiny.params(config)
    golden.export(tmp_path, config, params, 64)
    want = reference_models.logits(loaded(AutoModelForCausalLM, tmp_path), BATCH)
    close(np.asarray(tiny.logits(config, params, golden.rows(BATCH)))[REAL], want[REAL])
    _, read, again = opened(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, layout.to_canonical(params))
    close(np.asarray(tiny.logits(read, again, golden.rows(BATCH)))[REAL], want[REAL])


def test_a_value_head_travels_beside_the_model(tmp_path):
    config = tiny.config(vocab_size=reference_models.V, outputs=("lm", "value"))
    params = tiny.params(config)
    golden.export(tmp_path, config, params, 64)
    want = reference_models.logits(loaded(AutoModelForCausalLM, tmp_path), BATCH)
    close(np.asarray(tiny.logits(config, params, golden.rows(BATCH)))[REAL], want[REAL])
    _, read, again = opened(tmp_path)
    assert read.outputs == ("lm", "value")
    np.testing.assert_array_equal(again["ends"]["value_head"]["kernel"], params["ends"]["value_head"]["kernel"])
    assert transformer.scalar(read, again, np.zeros((1, config.hidden), np.float32), "value") == params["ends"]["value_head"]["bias"]
