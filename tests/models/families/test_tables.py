"""The weight tables: fused projections come apart as their families lay them out, and every row is its own inverse."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.models import families
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf.rows import Row
from tests.models import tiny

CONFIG = tiny.config(hidden=6, heads=2, kv_heads=1, head_dim=2, mlp=3)
WHOLE = tiny.config(hidden=4, heads=2, kv_heads=2, head_dim=2, mlp=3)


def row(family: str, theirs: str) -> Row:
    return next(row for row in families.load(family).ROWS if row.theirs == theirs)


def test_phi3_keeps_query_key_and_value_one_behind_the_other():
    tensor = np.arange(8 * 6).reshape(8, 6)  # 2 heads of queries, 1 of keys, 1 of values, 2 features each
    query, key, value = row("phi3", "model.layers.{i}.self_attn.qkv_proj.weight").split(tensor, CONFIG)
    np.testing.assert_array_equal(query, tensor[:4].T)
    np.testing.assert_array_equal(key, tensor[4:6].T)
    np.testing.assert_array_equal(value, tensor[6:].T)
    gate, up = row("phi3", "model.layers.{i}.mlp.gate_up_proj.weight").split(tensor[:6], CONFIG)
    np.testing.assert_array_equal(gate, tensor[:3].T)
    np.testing.assert_array_equal(up, tensor[3:6].T)


def test_gpt2_keeps_kernels_as_we_do_and_its_three_side_by_side():
    tensor = np.arange(4 * 12).reshape(4, 12)
    parts = row("gpt2", "transformer.h.{i}.attn.c_attn.weight").split(tensor, WHOLE)
    for n, part in enumerate(parts):
        np.testing.assert_array_equal(part, tensor[:, 4 * n : 4 * n + 4])
    biases = row("gpt2", "transformer.h.{i}.attn.c_attn.bias").split(np.arange(12), WHOLE)
    assert [list(bias) for bias in biases] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert row("gpt2", "transformer.h.{i}.mlp.c_fc.weight").split(tensor, WHOLE)[0] is tensor


def test_gpt_neox_keeps_each_heads_three_together():
    """Rows: head 0's query, key, value, then head 1's."""
    biases = row("gpt_neox", "gpt_neox.layers.{i}.attention.query_key_value.bias").split(np.arange(12), WHOLE)
    assert [list(bias) for bias in biases] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    tensor = np.arange(12 * 4).reshape(12, 4)
    kernels = row("gpt_neox", "gpt_neox.layers.{i}.attention.query_key_value.weight").split(tensor, WHOLE)
    for kernel, bias in zip(kernels, biases, strict=True):
        np.testing.assert_array_equal(kernel, tensor[np.asarray(bias)].T)


@pytest.mark.parametrize(("family", "block", "names"), [
    ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")), ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj"))])
def test_experts_projections_by_name(family, block, names):
    for theirs, ours in zip(names, ("gate", "up", "down"), strict=True):
        found = row(family, f"model.layers.{{i}}.{block}.experts.{{e}}.{theirs}.weight")
        assert found.ours == (f"layers/{{i}}/experts/{ours}",)
    assert row(family, f"model.layers.{{i}}.{block}.gate.weight").ours == ("layers/{i}/router/kernel",)


def test_the_second_norm_of_a_layer_is_another_in_each_family():
    """`post_attention_layernorm` precedes the MLP in Llama and follows the attention in OLMo-2 and Gemma."""
    name = "model.layers.{i}.post_attention_layernorm.weight"
    assert row("llama", name).ours == ("layers/{i}/mlp_norm/scale",)
    assert row("olmo2", name).ours == row("gemma2", name).ours == row("gemma3", name).ours == ("layers/{i}/attention_post_norm/scale",)
    assert row("gemma2", "model.layers.{i}.pre_feedforward_layernorm.weight").ours == ("layers/{i}/mlp_norm/scale",)


@pytest.mark.parametrize("name", families.names())
def test_every_row_is_its_own_inverse_and_no_name_stands_twice(name):
    rows = families.load(name).ROWS
    assert len({row.theirs for row in rows}) == len(rows)
    for found in rows:
        parts = [np.random.default_rng(n).normal(size=_shape(path, WHOLE)) for n, path in enumerate(found.ours)]
        back = found.split(found.join(parts, WHOLE), WHOLE)
        for part, same in zip(parts, back, strict=True):
            np.testing.assert_array_equal(part, same)


def _shape(path: str, config: ModelConfig) -> tuple[int, ...]:
    """Of a parameter, or of one expert's part of it: the kernels' own, and an odd size for vectors that pass unchanged."""
    if path.endswith(("/bias", "/scale")):
        return (config.hidden,)
    if path.endswith(("gate/kernel", "up/kernel")):
        return (config.hidden, config.mlp)
    return (config.hidden, config.heads * config.head_dim)
