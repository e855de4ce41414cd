"""What a config.json means: public models' own files in both schemas, every refusal, and what is written back.

The expected networks are in `published.py`, derived by hand from transformers' sources. That they compute what transformers computes is proved
elsewhere in this folder, on logits.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import families
from rlhf_jax.models.config import ModelConfig, RopeScaling
from tests.models import tiny
from tests.models.families.published import GONE, LLAMA3_SCALING, PUBLISHED, network, version4, version5

LLAMA, MISTRAL, QWEN2, GEMMA2, GEMMA3 = "Llama-2-7B", "Mistral-7B-v0.1", "Qwen2.5-0.5B", "gemma-2-2b", "gemma-3-1b"
PHI3, GPT2, NEOX, MIXTRAL, QWEN3_MOE = "Phi-3-mini-128k", "gpt2", "pythia-70m", "Mixtral-8x7B", "Qwen3-30B-A3B"


def fields(values: dict[str, Any]) -> dict[str, Any]:
    return families.read(values).fields


@pytest.mark.parametrize("version", [version4, version5])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_public_model_means_what_its_authors_published(name, version):
    reading = families.read(version(name))
    assert network(**reading.fields) == PUBLISHED[name][3]
    assert (reading.longest, reading.outputs, reading.left) == (PUBLISHED[name][2], ("lm",), [])


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_reads_as_the_same_network_and_states_both_schemas(name):
    config, longest = PUBLISHED[name][3], PUBLISHED[name][2]
    values = json.loads(json.dumps(families.write(config, longest)))
    reading = families.read(values)
    assert network(**reading.fields) == config
    assert (reading.longest, reading.left) == (longest, [])
    theta = {"gpt_neox": "rotary_emb_base"}.get(config.family, "rope_theta")
    new, old = {"rope_parameters"}, {theta, "rope_scaling"}
    for removed in (new, old) if config.position == "rope" else ():  # each schema alone says it all
        alone = families.read({key: value for key, value in values.items() if key not in removed})
        assert (network(**alone.fields), alone.longest) == (config, longest)


def test_every_family_has_a_public_model_here():
    assert {config.family for *_, config in PUBLISHED.values()} == set(families.names())


# --- defaults of keys that are missing ---


@pytest.mark.parametrize(
    ("name", "missing", "expected"),
    [
        (LLAMA, "num_key_value_heads", {"kv_heads": 32}),
        (LLAMA, "rms_norm_eps", {"norm_eps": 1e-6}),
        (LLAMA, "hidden_act", {"activation": "silu"}),
        (MISTRAL, "num_key_value_heads", {"kv_heads": 8}),
        (MISTRAL, "sliding_window", {"windows": (4096,)}),
        (QWEN2, "tie_word_embeddings", {"tied": False}),
        (QWEN2, "rope_theta", {"rope_theta": 10000.0}),
        ("Qwen3-0.6B", "head_dim", {"head_dim": 128}),
        (GEMMA2, "attn_logit_softcapping", {"attention_softcap": 50.0}),
        (GEMMA2, "final_logit_softcapping", {"logits_softcap": 30.0}),
        (GEMMA2, "head_dim", {"head_dim": 256}),
        (GEMMA2, "sliding_window", {"windows": (4096, 0)}),
        (GEMMA3, "rope_theta", {"rope_theta": 1e6, "local_rope_theta": 1e4}),
        (GEMMA3, "rope_local_base_freq", {"rope_theta": 1e6, "local_rope_theta": 1e4}),
        (GEMMA3, "final_logit_softcapping", {"logits_softcap": 0.0}),
        (PHI3, "rms_norm_eps", {"norm_eps": 1e-5}),
        ("OLMo-2-1B", "rms_norm_eps", {"norm_eps": 1e-5}),
        (GPT2, "layer_norm_epsilon", {"norm_eps": 1e-5}),
        (NEOX, "rotary_pct", {"rotary_dim": 16}),
        (NEOX, "use_parallel_residual", {"norm_placement": "parallel"}),
        (MIXTRAL, "rope_theta", {"rope_theta": 1e6}),
        (MIXTRAL, "rms_norm_eps", {"norm_eps": 1e-5}),
        (MIXTRAL, "sliding_window", {"windows": (0,)}),
        (MIXTRAL, "router_aux_loss_coef", {"balance_coef": 0.001}),
        (QWEN3_MOE, "norm_topk_prob", {"renormalise": False}),
        (QWEN3_MOE, "num_key_value_heads", {"kv_heads": 4}),
        (QWEN3_MOE, "head_dim", {"head_dim": 64}),
    ],
)
def test_a_missing_key_has_its_familys_default(name, missing, expected):
    assert missing in version4(name)
    found = fields(version4(name, **{missing: GONE}))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (LLAMA, {"num_key_value_heads": None}, {"kv_heads": 32}),
        (LLAMA, {"head_dim": None}, {"head_dim": 128}),
        (LLAMA, {"head_dim": 80}, {"head_dim": 80}),
        (LLAMA, {"attention_bias": True}, {"qkv_bias": True, "output_bias": True, "mlp_bias": False}),
        (LLAMA, {"mlp_bias": True}, {"qkv_bias": False, "mlp_bias": True}),
        (LLAMA, {"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}),
        (LLAMA, {"hidden_act": "gelu"}, {"activation": "gelu"}),
        (LLAMA, {"hidden_act": "gelu_fast"}, {"activation": "gelu_tanh"}),
        (LLAMA, {"hidden_act": "swish"}, {"activation": "silu"}),
        (LLAMA, {"hidden_act": "relu"}, {"activation": "relu"}),
        (LLAMA, {"pretraining_tp": None}, {"hidden": 4096}),
        (MISTRAL, {"sliding_window": None}, {"windows": (0,)}),
        (MISTRAL, {"layer_types": ["sliding_attention"] * 32}, {"windows": (4096,)}),
        (GEMMA2, {"attn_logit_softcapping": None, "final_logit_softcapping": None}, {"attention_softcap": 0.0, "logits_softcap": 0.0}),
        (GEMMA2, {"hidden_act": "gelu"}, {"activation": "gelu_tanh"}),  # Gemma 2 uses hidden_activation
        (GEMMA2, {"hidden_activation": "gelu"}, {"activation": "gelu"}),
        (GEMMA3, {"final_logit_softcapping": 30.0}, {"logits_softcap": 30.0}),
        (GPT2, {"n_inner": 100}, {"mlp": 100}),
        (GPT2, {"n_inner": None}, {"mlp": 3072}),
        (NEOX, {"use_parallel_residual": False}, {"norm_placement": "pre"}),
        (NEOX, {"attention_bias": False}, {"qkv_bias": False, "output_bias": False, "mlp_bias": True}),
        (NEOX, {"rotary_pct": 1.0}, {"rotary_dim": 0}),
        (NEOX, {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}, {"rope_theta": 10000.0, "rotary_dim": 16}),  # as transformers 4.50 wrote it
        (PHI3, {"partial_rotary_factor": 0.75, "rope_scaling": None}, {"rotary_dim": 72}),
        (QWEN3_MOE, {"use_sliding_window": True, "sliding_window": 100}, {"windows": (100,)}),
        (QWEN3_MOE, {"mlp_only_layers": [0]}, {"dense": (True, *[False] * 47)}),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, {"dense": (True, False)}),
        (QWEN3_MOE, {"decoder_sparse_step": 2, "mlp_only_layers": [1, 5, 9], "num_hidden_layers": 12}, {"dense": (True, True, True, False)}),
    ],
)
def test_a_value_is_read_as_transformers_reads_it(name, changes, expected):
    found = fields(version4(name, **changes))
    assert {key: found[key] for key in expected} == expected


# --- windows ---


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (QWEN2, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 21}, (*[0] * 21, 9, 9, 9)),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, (9,)),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 24}, (0,)),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": GONE, "num_hidden_layers": 30}, (*[0] * 28, 9, 9)),
        (QWEN2, {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0}, (0,)),
        (QWEN2, {"use_sliding_window": True, "sliding_window": GONE, "max_window_layers": 0}, (4096,)),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0,
                 "layer_types": ["full_attention", "sliding_attention", "sliding_attention"] * 8}, (0, 9, 9)),
        (GEMMA2, {"sliding_window": 9, "num_hidden_layers": 5}, (9, 0)),
        (GEMMA2, {"sliding_window": 9, "num_hidden_layers": 1}, (9,)),
        (GEMMA2, {"sliding_window": 9, "num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}, (0, 9)),
        (GEMMA3, {"sliding_window": 9, "num_hidden_layers": 7, "sliding_window_pattern": 3}, (9, 9, 0)),  # with a remainder of one
        (GEMMA3, {"sliding_window": 9, "num_hidden_layers": 8, "sliding_window_pattern": GONE}, (9, 9, 9, 9, 9, 0)),
        (GEMMA3, {"sliding_window": 9, "num_hidden_layers": 4, "sliding_window_pattern": 6}, (9,)),
        (GEMMA3, {"sliding_window": 9, "sliding_window_pattern": 1}, (0,)),
        (GEMMA3, {"sliding_window": 9, "num_hidden_layers": 4,
                  "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]}, (9, 0, 0)),
        (GEMMA3, {"sliding_window": 9, "num_hidden_layers": 3,
                  "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}, (9, 9, 0)),
        (PHI3, {"sliding_window": None}, (0,)),
    ],
)
def test_windows_are_the_shortest_pattern_of_the_layers(name, changes, expected):
    assert fields(version4(name, **changes))["windows"] == expected


# --- rotary positions ---

YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
TWO = [1.5] * 64


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
        ({"rope_type": "linear", "factor": 2}, RopeScaling(kind="linear", factor=2.0)),
        ({"type": "linear", "rope_type": "linear", "factor": 2}, RopeScaling(kind="linear", factor=2.0)),
        ({"type": "dynamic", "factor": 4.0}, RopeScaling(kind="dynamic", factor=4.0, original_context=4096)),
        ({"rope_type": "default"}, None),
        ({"rope_type": "yarn", **YARN}, RopeScaling(kind="yarn", factor=4.0, original_context=1024, attention_factor=0.1 * math.log(4) + 1)),
        ({"type": "yarn", **YARN, "attention_factor": None, "beta_fast": None, "beta_slow": None},
         RopeScaling(kind="yarn", factor=4.0, original_context=1024, attention_factor=0.1 * math.log(4) + 1)),
        ({"rope_type": "yarn", "factor": 4.0},  # the original context is then max_position_embeddings
         RopeScaling(kind="yarn", factor=4.0, original_context=4096, attention_factor=0.1 * math.log(4) + 1)),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512},  # 4096 / 512
         RopeScaling(kind="yarn", factor=8.0, original_context=512, attention_factor=0.1 * math.log(8) + 1)),
        ({"rope_type": "yarn", **YARN, "attention_factor": 1.25, "beta_fast": 20, "beta_slow": 2, "truncate": False},
         RopeScaling(kind="yarn", factor=4.0, original_context=1024, attention_factor=1.25, beta_fast=20.0, beta_slow=2.0, truncate=False)),
        ({"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
         RopeScaling(kind="yarn", factor=4.0, original_context=1024,
                     attention_factor=(0.1 * 0.707 * math.log(4) + 1) / (0.1 * 1.0 * math.log(4) + 1))),
        ({"rope_type": "yarn", **YARN, "mscale": 0.707},  # one of the two does nothing
         RopeScaling(kind="yarn", factor=4.0, original_context=1024, attention_factor=0.1 * math.log(4) + 1)),
        ({"rope_type": "longrope", "short_factor": TWO, "long_factor": TWO, "original_max_position_embeddings": 1024},
         RopeScaling(kind="longrope", factor=4.0, original_context=1024, short_factors=(1.5,) * 64, long_factors=(1.5,) * 64,
                     attention_factor=math.sqrt(1 + math.log(4) / math.log(1024)))),
        ({"rope_type": "longrope", "short_factor": TWO, "long_factor": TWO, "factor": 16.0, "original_max_position_embeddings": 1024},
         RopeScaling(kind="longrope", factor=16.0, original_context=1024, short_factors=(1.5,) * 64, long_factors=(1.5,) * 64,
                     attention_factor=math.sqrt(1 + math.log(16) / math.log(1024)))),
        ({"rope_type": "longrope", "short_factor": TWO, "long_factor": TWO, "attention_factor": 1.0, "original_max_position_embeddings": 1024},
         RopeScaling(kind="longrope", factor=4.0, original_context=1024, short_factors=(1.5,) * 64, long_factors=(1.5,) * 64)),
    ],
)
def test_a_scaling_means_the_same_in_both_schemas_and_survives_a_round_trip(given, expected):
    old = families.read(version4(LLAMA, rope_scaling=given, rope_theta=5e5))
    new = families.read(version5(LLAMA, rope_parameters={"rope_theta": 5e5, **given}))
    both = families.read(version4(LLAMA, rope_theta=5e5, rope_scaling=given, rope_parameters={"rope_theta": 5e5, **given}))
    assert old.fields["rope_scaling"] == new.fields["rope_scaling"] == both.fields["rope_scaling"] == expected
    assert old.fields["rope_theta"] == new.fields["rope_theta"] == both.fields["rope_theta"] == 5e5
    assert old.left == new.left == both.left == []
    written = json.loads(json.dumps(families.write(network(**old.fields))))
    assert families.read(written).fields == old.fields


def test_the_original_context_may_stand_beside_the_section():
    scaling = {key: value for key, value in LLAMA3_SCALING.items() if key != "original_max_position_embeddings"}
    beside = fields(version4(LLAMA, rope_scaling=scaling, original_max_position_embeddings=2048))
    assert beside["rope_scaling"].original_context == 2048
    assert fields(version4(LLAMA, rope_scaling=scaling))["rope_scaling"].original_context == 4096


def test_a_network_is_used_up_to_the_original_context_where_its_frequencies_depend_on_the_text():
    assert families.read(version4(PHI3)).context == 4096
    assert families.read(version4("Llama-3.1-8B")).context == 131072


@pytest.mark.parametrize("old_name", ["su", "yarn", "longrope"])
def test_early_names_of_phi3s_scaling(old_name):
    scaling = {**version4(PHI3)["rope_scaling"], "type": old_name}
    assert fields(version4(PHI3, rope_scaling=scaling)) == fields(version4(PHI3))


def test_phi3_is_written_as_transformers_4_wants_it():
    """Exactly three keys, and nothing that is computed from the two contexts."""
    values = families.write(PUBLISHED[PHI3][3])
    assert set(values["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert (values["max_position_embeddings"], values["original_max_position_embeddings"]) == (131072, 4096)


def test_the_written_share_of_a_head_never_rounds_down():
    base = PUBLISHED[NEOX][3]
    for head_dim in (44, 46, 52, 78, 86, 88, 90, 96, 100):  # several of whose shares are a hair too small as floats
        for rotary in range(2, head_dim, 2):
            config = dataclasses.replace(base, head_dim=head_dim, hidden=8 * head_dim, rotary_dim=rotary)
            assert fields(families.write(config))["rotary_dim"] == rotary


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (LLAMA, {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta = 500000 contradict"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "contradicts rope_parameters"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "contradicts"),
        (LLAMA, {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "rope_scaling.type = 'linear': contradicts rope_type"),
        (LLAMA, {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling.type = 'su'"),
        (LLAMA, {"rope_scaling": {"rope_type": "proportional"}}, "rope_scaling.rope_type = 'proportional'"),
        (LLAMA, {"rope_parameters": {"rope_type": "axial"}}, "rope_parameters.rope_type = 'axial'"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor = 0: must be above 0"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor = '2': must be a finite number, got str"),
        (LLAMA, {"rope_scaling": [2.0]}, "rope_scaling = [2.0]: must be a mapping"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 1024}}, "max_position_embeddings = 4096"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks rope_scaling.low_freq_factor"),
        (LLAMA, {"rope_scaling": LLAMA3_SCALING, "original_max_position_embeddings": 4096}, "original_max_position_embeddings = 8192 and"),
        (LLAMA, {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": TWO}}, "short_factor = [1.0]: must be 64 numbers"),
        (LLAMA, {"rope_scaling": {"type": "longrope", "short_factor": TWO, "long_factor": "x"}}, "long_factor = 'x': must be a list"),
        (LLAMA, {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "rope_scaling.mrope_section"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotate 0.5 of each head"),
        (NEOX, {"rope_theta": 5e5}, "rotary_emb_base = 10000 and rope_theta = 500000 contradict"),
        (NEOX, {"partial_rotary_factor": 0.5}, "rotary_pct = 0.25 and partial_rotary_factor = 0.5 contradict"),
        (NEOX, {"head_dim": 32}, "head_dim = 32"),
        (PHI3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type = 'linear'"),
        (PHI3, {"original_max_position_embeddings": GONE, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48, "original_max_position_embeddings": 8192}},
         "original_max_position_embeddings = 8192: write it beside the section too, or transformers takes 4096"),
        (GEMMA3, {"rope_scaling": {"type": "linear", "factor": 8.0}}, 'rope_scaling.type = \'linear\': write it as "rope_type"'),
        (GEMMA3, {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_scaling.rope_type = 'yarn'"),
        (GEMMA3, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "must hold one rotation for full_attention"),
        (GEMMA3, {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}}, "rope_theta = 500000 and rope_theta"),
        (GEMMA3, {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "sliding_attention.rope_type = 'linear'"),
        (GEMMA3, {"rope_parameters": {"sliding_attention": {"rope_theta": 2e4}}}, "rope_theta = 20000 and rope_local_base_freq = 10000"),
    ],
)
def test_a_rotation_that_contradicts_itself_or_is_not_built_is_refused(name, changes, said):
    with pytest.raises(UserError) as error:
        families.read(version4(name, **changes), "some/config.json")
    assert said in str(error.value)
    assert str(error.value).startswith("some/config.json")


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (LLAMA, {"model_type": GONE}, "config.json lacks model_type"),
        (LLAMA, {"model_type": "lama"}, "model_type = 'lama' is not supported (did you mean 'llama'?): only gemma2"),
        (LLAMA, {"model_type": "t5"}, "model_type = 't5' is not supported: only gemma2"),
        (LLAMA, {"hidden_size": GONE}, "config.json lacks hidden_size"),
        (LLAMA, {"max_position_embeddings": None}, "config.json lacks max_position_embeddings"),
        (LLAMA, {"num_hidden_layers": 32.0}, "num_hidden_layers = 32.0: must be an integer, got float"),
        (LLAMA, {"vocab_size": True}, "vocab_size = True: must be an integer, got bool"),
        (LLAMA, {"head_dim": 10**400}, "no size is so large"),
        (LLAMA, {"rope_theta": 10**400}, "must be a finite number"),
        (MIXTRAL, {"num_local_experts": 0}, "num_local_experts = 0: must be at least 1"),
        (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5': must be a finite number, got str"),
        (LLAMA, {"rope_theta": math.inf}, "rope_theta = inf: must be a finite number"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings = 1: must be true or false, got int"),
        (LLAMA, {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu': this activation is not built here"),
        (LLAMA, {"num_attention_heads": 30}, "num_attention_heads = 30: must divide hidden_size = 4096"),
        (LLAMA, {"num_attention_heads": 30, "head_dim": 128}, "num_attention_heads = 30"),  # transformers 5 refuses it too
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp = 2"),
        (LLAMA, {"attention_multiplier": 0.5}, "attention_multiplier = 0.5"),
        (LLAMA, {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LLAMA, {"is_encoder_decoder": True}, "is_encoder_decoder = True"),
        (LLAMA, {"architectures": ["LlamaForTokenClassification"]}, "architectures = ['LlamaForTokenClassification']"),
        (LLAMA, {"architectures": ["LlamaModel"]}, "only causal language models and sequence classifiers"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "a classifier of 2 labels is not a reward model"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "A", "1": "B", "2": "C"}}, "classifier of 3 labels"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window = 0: must be null"),
        (MISTRAL, {"attention_bias": True}, "attention_bias = True"),
        (MISTRAL, {"layer_types": ["full_attention", "sliding_attention"] * 16}, "the same window"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "the same window"),
        (MISTRAL, {"layer_types": ["chunked_attention"] * 32}, "layers of type chunked_attention are not built here"),
        (QWEN2, {"layer_types": ["full_attention"] * 23}, "must name num_hidden_layers = 24 layers"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "use_sliding_window says that there is none"),
        (QWEN2, {"use_mrope": True}, "use_mrope = True"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (GEMMA2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0: must be above 0"),
        (GEMMA2, {"sliding_window": None}, "sliding_window or use_sliding_window says that there is none"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),  # transformers' Gemma 3 passes over it
        (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        ("gemma-3-4b", {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, "text_config.tie_word_embeddings = True"),
        ("gemma-3-4b", {"text_config": {"use_bidirectional_attention": True}}, "text_config.use_bidirectional_attention = True"),
        (PHI3, {"attention_bias": True}, "attention_bias = True"),
        (GPT2, {"n_head": 7}, "n_head = 7: must divide n_embd = 768"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights = False"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention = True"),
        (NEOX, {"num_attention_heads": 7}, "num_attention_heads = 7: must divide hidden_size = 512"),
        (QWEN3_MOE, {"num_local_experts": 64}, "num_experts = 128 and num_local_experts = 64 contradict"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        (QWEN3_MOE, {"mlp_only_layers": ["0"]}, "mlp_only_layers = ['0']: must be a list of integers"),
    ],
)
def test_what_is_not_built_or_not_understood_is_refused_by_key_and_value(name, changes, said):
    with pytest.raises(UserError) as error:
        families.read(version4(name, **changes))
    assert said in str(error.value)


@pytest.mark.parametrize("key", ["pretraining_tp", "use_bidirectional_attention", "is_encoder_decoder", "embedding_multiplier"])
def test_a_refused_key_at_its_neutral_value_is_fine(key):
    neutral = {"pretraining_tp": 1, "embedding_multiplier": 1.0}.get(key, False)
    assert families.read(version4(LLAMA, **{key: neutral})).left == []


def test_keys_that_are_not_understood_are_told_and_harmless_ones_are_not():
    strange = {"mystery": 1, "rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}}
    harmless = {"attention_dropout": 0.1, "bos_token_id": None, "_attn_implementation": "sdpa", "output_attentions": False, "resid_pdrop": 0.2}
    assert families.read(version4(LLAMA, **strange, **harmless)).left == ["mystery", "rope_scaling.finetuned"]


def test_a_model_with_vision_says_that_its_text_alone_is_read():
    assert "without its vision tower" in families.read(version4("gemma-3-4b")).notes[0]
    assert families.read(version4(GEMMA3)).notes == []


def test_a_classifier_of_one_label_is_a_reward_model():
    score = {"architectures": ["LlamaForSequenceClassification"]}
    assert families.read(version4(LLAMA, **score, id2label={"0": "LABEL_0"})).outputs == ("score",)
    assert families.read(version4(LLAMA, **score, num_labels=1)).outputs == ("score",)
    assert families.read(version4(LLAMA, architectures=GONE)).outputs == ("lm",)


# --- writing ---


@pytest.mark.parametrize("name", families.names())
def test_a_fresh_network_of_every_family_has_a_hugging_face_form(name):
    sizes = {"experts": 4, "experts_per_token": 2, "expert_mlp": 24} if name in ("mixtral", "qwen3_moe") else {}
    if name in ("gpt2", "gpt_neox"):
        sizes |= {"heads": 4, "kv_heads": 4}
    config = tiny.config(family=name, **families.fresh(name) | sizes)
    values = json.loads(json.dumps(families.write(config)))
    assert families.by_model_type(values["model_type"]) == name
    assert values["architectures"] == [families.load(name).CLASSES["lm"]]
    assert values["dtype"] == values["torch_dtype"] == "float32"
    back = families.read(values)
    assert families.unsupported(network(**back.fields), name) == []
    assert {key: back.fields[key] for key in sizes if key in back.fields} == sizes
    assert (back.longest, back.left) == ({"gpt2": 1024}.get(name, config.context), [])


def test_a_reward_model_is_written_as_a_classifier_of_one_label():
    values = families.write(tiny.config(outputs=("score",)))
    assert values["architectures"] == ["LlamaForSequenceClassification"]
    assert families.read(values).outputs == ("score",)
    assert families.write(tiny.config(outputs=("lm", "value")))["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("llama", {}, []),
        ("llama", {"windows": (8,)}, ["windows"]),
        ("llama", {"qkv_bias": True}, ["output_bias"]),
        ("llama", {"output_bias": True}, ["output_bias"]),
        ("llama", {"norm": "layer"}, ["norm"]),
        ("llama", {"norm_placement": "both", "scaled_embedding": True}, ["norm_placement", "scaled_embedding"]),
        ("llama", {"gated": False}, ["gated"]),
        ("llama", {"rotary_dim": 2}, ["rotary_dim"]),
        ("llama", {"rotary_dim": 4}, []),  # all of a head
        ("llama", {"attention_scale": 0.5}, []),  # head_dim^−½
        ("llama", {"attention_scale": 0.7}, ["attention_scale"]),
        ("llama", {"attention_softcap": 1.0, "logits_softcap": 2.0}, ["attention_softcap", "logits_softcap"]),
        ("llama", {"position": "learned", "positions": 64}, ["position", "positions"]),
        ("llama", {"experts": 4, "experts_per_token": 2, "expert_mlp": 8}, ["experts", "experts_per_token", "expert_mlp"]),
        ("llama", {"local_rope_theta": 5.0}, []),  # of no layer
        ("llama", {"heads": 3, "kv_heads": 3}, ["heads"]),
        ("llama", {"qk_norm": "head"}, ["qk_norm"]),
        ("llama", {"rope_scaling": RopeScaling(kind="yarn", factor=2.0)}, []),
        ("mistral", {"windows": (8, 8)}, []),
        ("mistral", {"windows": (8, 0)}, ["windows"]),
        ("mistral", {"heads": 3, "kv_heads": 3}, []),
        ("qwen2", {"qkv_bias": True, "windows": (8, 0)}, []),
        ("qwen2", {"qkv_bias": True, "windows": (8, 4)}, ["windows"]),
        ("qwen2", {}, ["qkv_bias"]),
        ("gemma2", {"attention_scale": 7**-0.5}, []),
        ("gemma2", {"attention_scale": 0.7}, ["attention_scale"]),
        ("gemma2", {"norm_offset": False}, ["norm_offset"]),
        ("gemma3", {"attention_softcap": 2.0}, ["attention_softcap"]),
        ("gemma3", {"local_rope_theta": 0.0}, []),
        ("gemma3", {"rope_scaling": RopeScaling(kind="linear", factor=2.0)}, []),
        ("gemma3", {"rope_scaling": RopeScaling(kind="linear", factor=2.0), "local_rope_theta": 0.0}, ["local_rope_theta"]),
        ("gemma3", {"rope_scaling": RopeScaling(kind="yarn", factor=2.0)}, ["rope_scaling"]),
        ("phi3", {"rotary_dim": 2, "windows": (8,)}, []),
        ("phi3", {"rope_scaling": RopeScaling(kind="linear", factor=2.0)}, ["rope_scaling"]),
        ("gpt2", {"heads": 4, "kv_heads": 4, "rope_theta": 3.0}, []),  # no rotation
        ("gpt2", {"kv_heads": 2}, ["kv_heads"]),
        ("gpt2", {"kv_heads": 4, "head_dim": 6}, ["head_dim"]),
        ("gpt_neox", {"kv_heads": 4, "norm_placement": "pre", "rotary_dim": 2}, []),
        ("gpt_neox", {"kv_heads": 4, "norm_placement": "post"}, ["norm_placement"]),
        ("gpt_neox", {"kv_heads": 4, "heads": 3}, ["heads"]),
        ("mixtral", {"experts": 4, "experts_per_token": 2, "expert_mlp": 8}, []),  # its `mlp` is nowhere used
        ("mixtral", {"experts": 4, "experts_per_token": 2, "expert_mlp": 8, "renormalise": False}, ["renormalise"]),
        ("mixtral", {"experts": 4, "experts_per_token": 2, "expert_mlp": 8, "dense": (True, False)}, ["dense"]),
        ("qwen3_moe", {"experts": 4, "experts_per_token": 2, "expert_mlp": 8, "dense": (True, False)}, []),
        ("qwen3_moe", {"experts": 4, "experts_per_token": 2, "expert_mlp": 8, "dense": (True, True)}, []),  # dense altogether
    ],
)
def test_a_network_that_a_family_cannot_be_is_told_by_its_fields(name, changes, expected):
    if name == "gpt_neox" and "heads" in changes:
        changes = changes | {"kv_heads": 3}
    config = tiny.config(family=name, **families.fresh(name) | changes) if name != "qwen2" else tiny.config(family=name, **changes)
    assert families.unsupported(config, name) == expected
    if expected:
        with pytest.raises(UserError, match=f"config.model.{expected[0]}"):
            families.write(config)
    else:
        families.write(config)


def test_the_longest_context_is_kept_unless_a_scaling_is_computed_from_it():
    assert families.write(tiny.config())["max_position_embeddings"] == 64
    assert families.write(tiny.config(), 4096)["max_position_embeddings"] == 4096
    yarn = tiny.config(rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_context=32))
    assert families.write(yarn, 4096)["max_position_embeddings"] == 128
    dynamic = tiny.config(rope_scaling=RopeScaling(kind="dynamic", factor=4.0, original_context=64))
    assert families.write(dynamic, 4096)["max_position_embeddings"] == 64


# --- families by name ---


def test_a_family_that_is_not_there_is_refused_with_the_nearest():
    assert families.names() == (
        "gemma2", "gemma3", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe")
    for name in ("qwen", "_rope", "os"):
        with pytest.raises(UserError, match=r"config.model.family = .* is not a family of models"):
            families.load(name)
    with pytest.raises(UserError, match=r"did you mean 'mixtral'"):
        families.load("mixtrel")


@pytest.mark.parametrize("name", families.names())
def test_a_fresh_familys_fields_are_fields_that_differ_from_the_defaults(name):
    plain, fresh = tiny.config(), families.fresh(name)
    assert all(getattr(plain, key) != value for key, value in fresh.items())
    assert isinstance(tiny.config(**fresh), ModelConfig)


@pytest.mark.parametrize(
    ("name", "theirs", "expected"),
    [
        ("gpt2", "h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        ("gpt2", "wte.weight", "transformer.wte.weight"),
        ("gpt2", "transformer.ln_f.bias", "transformer.ln_f.bias"),
        ("gpt_neox", "lm_head.weight", "embed_out.weight"),
        ("gemma3", "language_model.model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("gemma3", "model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("gemma3", "language_model.lm_head.weight", "lm_head.weight"),
        ("gemma3", "model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("llama", "model.norm.weight", "model.norm.weight"),
    ],
)
def test_other_names_of_tensors(name, theirs, expected):
    assert families.renamed(name, theirs) == expected


@pytest.mark.parametrize(
    ("name", "theirs", "expected"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("llama", "model.layers.0.self_attn.q_proj.weight", False),
        ("gpt2", "h.0.attn.bias", True),
        ("gpt2", "transformer.h.0.attn.masked_bias", True),
        ("gpt2", "transformer.h.0.attn.c_attn.bias", False),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", True),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense.bias", False),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", True),
        ("gemma3", "vision_tower.vision_model.embeddings.patch_embedding.weight", True),
        ("gemma3", "model.multi_modal_projector.mm_soft_emb_norm.weight", True),
        ("gemma3", "language_model.model.norm.weight", False),
    ],
)
def test_tensors_that_hold_nothing_of_the_models(name, theirs, expected):
    assert families.ignored(name, theirs) is expected
