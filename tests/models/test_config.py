"""A model's configuration: each mistake is one sentence that names its key, and JSON gives back what it was given."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig
from rlhf_jax.models.config import Lora, RopeScaling
from tests.models import tiny


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 0}, "config.model.vocab_size = 0: must be at least 1"),
        ({"layers": 0}, "config.model.layers = 0"),
        ({"context": -1}, "config.model.context = -1"),
        ({"kv_heads": 3}, "config.model.kv_heads = 3: must divide config.model.heads = 4"),
        ({"head_dim": 5}, "config.model.head_dim = 5: must be even"),
        ({"dropout": 1.0}, "config.model.dropout = 1.0: must lie in"),
        ({"dropout": -0.1}, "config.model.dropout = -0.1: must lie in"),
        ({"remat": "some"}, "config.model.remat = 'some': must be one of none, full, dots"),
        ({"logits_chunk": -1}, "config.model.logits_chunk = -1"),
        ({"param_dtype": "float16"}, "config.model.param_dtype = 'float16': must be one of float32, bfloat16"),
        ({"compute_dtype": "int8"}, "config.model.compute_dtype = 'int8'"),
        ({"outputs": ("lm", "vote")}, "must be drawn from lm, value, score"),
        ({"norm_placement": "before"}, "config.model.norm_placement = 'before': must be one of pre, post, both, parallel"),
        ({"rotary_dim": 3}, "config.model.rotary_dim = 3: must be even"),
        ({"rotary_dim": 6}, "config.model.rotary_dim = 6: exceeds config.model.head_dim = 4"),
        ({"windows": ()}, "config.model.windows = (): needs at least one entry"),
        ({"windows": (-1,)}, "config.model.windows = (-1,): must be 0"),
        ({"position": "learned", "positions": 8}, "config.model.context = 64: exceeds the 8 positions"),
        ({"experts": 2, "experts_per_token": 3, "expert_mlp": 4}, "config.model.experts_per_token = 3: must lie between 1 and"),
        ({"rope_scaling": RopeScaling(kind="dynamic", factor=2.0, original_context=32)}, "config.model.context = 64: dynamic rope scaling changes"),
    ],
)
def test_a_value_out_of_range_is_named(change, said):
    with pytest.raises(UserError) as error:
        tiny.config(**change)
    assert said in str(error.value)


def section() -> dict:
    return {key: value for key, value in dataclasses.asdict(tiny.BASE).items() if key not in ("outputs", "lora")}


def test_create_wants_every_key_and_no_other():
    assert ModelConfig.create(section(), ("lm",)) == tiny.BASE
    with pytest.raises(UserError, match=r"config\.model\.hiden is not a model option \(did you mean 'hidden'\?\)"):
        ModelConfig.create({**section(), "hiden": 8}, ("lm",))
    with pytest.raises(UserError, match=r"config\.critic lacks heads, hidden"):
        ModelConfig.create({k: v for k, v in section().items() if k not in ("hidden", "heads")}, ("lm",), "config.critic")


def test_json_gives_the_same_configuration_back():
    config = tiny.config(
        outputs=("lm", "value"), tied=True, windows=(3, 0), rope_scaling=RopeScaling(kind="longrope", original_context=64, short_factors=(1.0, 2.0)),
        lora=Lora(rank=2, alpha=4.0, targets="query"),
    )
    again = ModelConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config and hash(again) == hash(config)


def test_difference_names_shapes_and_meaning_but_not_layout_or_precision():
    shape, runtime = dict(hidden=8, rope_theta=5.0, tied=True), dict(scan_layers=True, compute_dtype="bfloat16", remat="full", context=9)
    other = tiny.config(**shape, **runtime, dropout=0.5)
    assert tiny.BASE.difference(other) == ["hidden", "rope_theta", "tied"]
    assert tiny.BASE.difference(tiny.BASE) == []
