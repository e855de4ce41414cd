"""Every family against transformers 5.23.0, by fixtures: logits, scores, greedy generation, both schemas of config.json.

The fixtures are models whose every parameter and option is audible; two tests here make sure that they are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sampling
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, Networks, NetworkSpec, families
from rlhf_jax.models.config import RUNTIME, RopeScaling
from rlhf_jax.types import PyTree, Sequences
from tests.models import tiny
from tests.models.families import golden, precision

SCANNED = {"gemma3": 3, "gpt_neox": 1, "mixtral": 1}  # a unit and its length; gemma3 has a layer left over
GREEDY = dict(max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, stop_ids=(), pad_id=0)


def test_every_family_has_its_fixture():
    assert {golden.source(name).config.family for name in golden.POLICIES} == set(families.names())
    assert len(golden.REWARDS) == 5


def gap(name: str, config: ModelConfig, params: PyTree) -> float:
    """The largest distance of a logit from transformers'; logits of padding are finite."""
    want = golden.expected(name)
    got = np.asarray(tiny.logits(config, params, golden.rows(want)))
    assert np.isfinite(got).all()
    return float(np.abs(got[want["segment_ids"] != 0] - want["logits"]).max())


@pytest.mark.parametrize("name", golden.POLICIES)
def test_logits_of_full_padded_and_packed_rows_are_those_of_transformers(name):
    assert gap(name, *golden.network(name, scan_layers=False)) <= golden.TOLERANCE


@pytest.mark.parametrize("name", SCANNED)
def test_so_are_those_of_scanned_layers(name):
    config, params = golden.network(name, scan_layers=True)
    assert config.unit == SCANNED[name]
    assert gap(name, config, params) <= golden.TOLERANCE


@functools.partial(tiny.jit, static_argnums=0)
def scores(config: ModelConfig, params: PyTree, seqs: Sequences) -> jax.Array:
    return Networks({"reward": params}, {}, NetworkSpec(reward=config)).reward(seqs).scores


@pytest.mark.parametrize("name", golden.REWARDS)
def test_scores_are_those_of_transformers_sequence_classifiers(name):
    want = golden.expected(name)
    assert golden.source(name).network == "reward"
    got = np.asarray(scores(*golden.network(name, scan_layers=False), golden.rows(want)))
    at = golden.last(want["segment_ids"])
    np.testing.assert_allclose(got[np.arange(6), at[:6]], want["scores"], rtol=0, atol=golden.TOLERANCE)


@functools.partial(tiny.jit, static_argnums=0)
def greedy(config: ModelConfig, params: PyTree, prompts):
    nets = Networks({"policy": params}, {}, NetworkSpec(policy=config))
    return sampling.generate(nets, prompts, jax.random.key(0), iteration=0, **GREEDY)


ALIKE = ("llama_yarn", "llama_linear_tied", "llama_dynamic", "llama_biases", "qwen2", "phi3_longrope", "gpt_neox")  # decoded as another fixture is


def later(slow: tuple[str, ...]) -> list[Any]:
    """All fixtures, some of them in the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in golden.POLICIES]


@pytest.mark.parametrize("name", later(ALIKE))
def test_greedy_generation_is_that_of_transformers(name):
    """Cached, from prompts padded on the left, with scanned layers where they repeat. No choice was near a tie, so that all 64 tokens are equal."""
    want = golden.expected(name)
    assert want["margins"].min() > 1e-4 and want["generated"].shape == (3, 64)
    rollout = greedy(*golden.network(name, scan_layers=True), golden.prompts(want))
    np.testing.assert_array_equal(rollout.seqs.tokens[:, want["prompts"].shape[1] :], want["generated"])


@functools.partial(tiny.jit, static_argnums=0)
def sampled(config: ModelConfig, params: PyTree, prompts):
    nets = Networks({"policy": params}, {}, NetworkSpec(policy=config))
    rollout = sampling.generate(nets, prompts, jax.random.key(0), iteration=0, **GREEDY | dict(max_new_tokens=24, temperature=1.0))
    return rollout.sampler_logps, nets.policy(rollout.seqs).logps, rollout.seqs.loss_mask


@pytest.mark.parametrize("name", later(tuple(name for name in golden.POLICIES if name not in ("gemma3", "gpt2", "mixtral"))))
def test_the_samplers_log_probs_are_the_trainers(name):
    drawn, trained, mask = map(np.asarray, sampled(*golden.network(name, scan_layers=True), golden.prompts(golden.expected(name))))
    assert mask.sum() == 3 * 24 and (drawn[mask] < -0.1).any()
    np.testing.assert_allclose(drawn[mask], trained[mask], rtol=0, atol=golden.TOLERANCE)


@pytest.mark.parametrize("name", later(tuple(name for name in golden.POLICIES if name != "gemma2")))
def test_bfloat16_errs_no_more_than_transformers_does(name):
    """Mean and 99th percentile of |Δ log p| against float32; the maximum is one token's."""
    assert (precision.error(name) <= np.array([1.2, 1.3, np.inf]) * golden.expected(name)["bfloat16_error"]).all()


# --- config.json ---


@pytest.mark.parametrize("name", [name for name in golden.NAMES if (golden.FOLDER / name / "config_v4.json").exists()])
def test_both_schemas_of_a_configuration_mean_one_network(name):
    new, old = (families.read(json.loads((golden.FOLDER / name / file).read_text())) for file in ("config.json", "config_v4.json"))
    assert new.fields == old.fields and new.outputs == old.outputs and new.longest == old.longest
    assert new.left == old.left == []


def test_a_length_at_which_the_frequencies_would_change_is_refused():
    for name in ("llama_dynamic", "phi3_longrope"):
        config = golden.source(name).config
        assert config.context == 112
        with pytest.raises(UserError, match=r"config\.model\.context = 113"):
            dataclasses.replace(config, context=113)


# --- the fixtures themselves ---


@pytest.mark.parametrize("name", golden.POLICIES)
def test_every_parameter_of_a_fixture_is_heard(name):
    """One parameter at its neutral value, and transformers' logits are missed."""
    config, params = golden.network(name, scan_layers=False)
    leaves, treedef = jax.tree.flatten_with_path(params)
    for number, (path, leaf) in enumerate(leaves):
        names = [str(key.key) for key in path]
        if config.position == "learned" and names[-2:] == ["key", "bias"]:
            continue  # without rotation it adds the same to all logits of a query
        neutral = jnp.ones_like(leaf) if names[-1] == "scale" and not config.norm_offset else jnp.zeros_like(leaf)
        changed = jax.tree.unflatten(treedef, [neutral if i == number else value for i, (_, value) in enumerate(leaves)])
        assert gap(name, config, changed) > 10 * golden.TOLERANCE, "/".join(names)


def without(config: ModelConfig) -> dict[str, ModelConfig]:
    """The network with one option after another at its default, but for those that change the parameters' shapes or this network's form."""
    plain = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    shaping = (*RUNTIME, "family", "outputs", "balance_coef", "norm", "norm_placement", "gated", "qkv_bias", "output_bias", "mlp_bias", "qk_norm",
               "position", "positions", "experts", "experts_per_token", "expert_mlp", "dense")
    found = {}
    if config.rope_scaling and config.rope_scaling.kind == "longrope":
        shaping += ("rotary_dim",)  # one factor per frequency
    for key, default in plain.items():
        if key not in shaping and default is not dataclasses.MISSING and getattr(config, key) != default:
            found[key] = dataclasses.replace(config, **{key: default})
    if scaling := config.rope_scaling:
        plain = dataclasses.asdict(RopeScaling(kind="linear"))
        fixed = ["kind", "short_factors", "long_factors"]
        fixed += ["original_context", "factor"] if scaling.kind in ("dynamic", "longrope") else []  # of what lies beyond
        other = {key: dataclasses.replace(scaling, **{key: value}) for key, value in plain.items() if key not in fixed}
        found |= {f"rope_scaling.{key}": dataclasses.replace(config, rope_scaling=value) for key, value in other.items() if value != scaling}
    found["rope_theta"] = dataclasses.replace(config, rope_theta=1.5 * config.rope_theta)
    found["norm_eps"] = dataclasses.replace(config, norm_eps=1e-6)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.POLICIES)
def test_every_option_of_a_fixture_is_heard(name):
    config, params = golden.network(name, scan_layers=False)
    unheard = {"rope_theta"} if config.position == "learned" else {"rope_scaling"} if name == "llama_dynamic" else set()
    for option, changed in without(config).items():
        assert (gap(name, changed, params) > 5 * golden.TOLERANCE) != (option.split(".")[0] in unheard), option
