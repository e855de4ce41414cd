"""Weight tables of Llama and its descendants, in pieces that the families put together, and the splitting of fused projections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf.rows import Row, same, transposed

LAYER = "model.layers.{i}."
INVERSE_FREQUENCIES = r".*\.rotary_emb\.inv_freq$"  # old checkpoints hold RoPE's frequencies, which config.json states


def linear(theirs: str, ours: str) -> tuple[Row, ...]:
    """Kernel and bias of a torch.nn.Linear.

    Args:
      theirs: its name, e.g. "model.layers.{i}.self_attn.q_proj".
      ours: its path, e.g. "layers/{i}/query".
    """
    return transposed(f"{theirs}.weight", f"{ours}/kernel"), same(f"{theirs}.bias", f"{ours}/bias")


def layer_norm(theirs: str, ours: str) -> tuple[Row, ...]:
    """Gain and bias of a torch.nn.LayerNorm."""
    return same(f"{theirs}.weight", f"{ours}/scale"), same(f"{theirs}.bias", f"{ours}/bias")


def fused(theirs: str, ours: Sequence[str]) -> Row:
    """One torch.nn.Linear whose outputs are those of several projections, one behind the other.

    Args:
      theirs: the tensor, [sum of out, in].
      ours: the kernels' paths: query, key, value, or gate, up.
    """

    def split(tensor: np.ndarray, config: ModelConfig) -> Sequence[np.ndarray]:
        sizes = [_out(config, path) for path in ours]
        return [part.T for part in np.split(tensor, np.cumsum(sizes)[:-1], axis=0)]

    return Row(theirs, tuple(ours), split, lambda parts, _: np.concatenate([part.T for part in parts], axis=0))


def _out(config: ModelConfig, path: str) -> int:
    """Outputs of a projection."""
    name = path.split("/")[-2]
    if name in ("gate", "up"):
        return config.mlp
    return (config.heads if name == "query" else config.kv_heads) * config.head_dim


ENDS = (
    same("model.embed_tokens.weight", "ends/embedding"), same("model.norm.weight", "ends/norm/scale"),
    transposed("lm_head.weight", "ends/lm_head"), transposed("score.weight", "ends/score_head/kernel"),
)
OUTPUT = linear(LAYER + "self_attn.o_proj", "layers/{i}/output")
ATTENTION = (
    *linear(LAYER + "self_attn.q_proj", "layers/{i}/query"), *linear(LAYER + "self_attn.k_proj", "layers/{i}/key"),
    *linear(LAYER + "self_attn.v_proj", "layers/{i}/value"), *OUTPUT,
)
QK_NORMS = (
    same(LAYER + "self_attn.q_norm.weight", "layers/{i}/query_norm/scale"), same(LAYER + "self_attn.k_norm.weight", "layers/{i}/key_norm/scale"),
)
PRE_NORMS = (
    same(LAYER + "input_layernorm.weight", "layers/{i}/attention_norm/scale"),
    same(LAYER + "post_attention_layernorm.weight", "layers/{i}/mlp_norm/scale"),
)
POST_NORMS = (
    same(LAYER + "post_attention_layernorm.weight", "layers/{i}/attention_post_norm/scale"),
    same(LAYER + "post_feedforward_layernorm.weight", "layers/{i}/mlp_post_norm/scale"),
)
BOTH_NORMS = (
    same(LAYER + "input_layernorm.weight", "layers/{i}/attention_norm/scale"),
    same(LAYER + "pre_feedforward_layernorm.weight", "layers/{i}/mlp_norm/scale"), *POST_NORMS,
)
DOWN = linear(LAYER + "mlp.down_proj", "layers/{i}/down")
MLP = (*linear(LAYER + "mlp.gate_proj", "layers/{i}/gate"), *linear(LAYER + "mlp.up_proj", "layers/{i}/up"), *DOWN)


def experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Router and experts of a layer, one tensor per expert and projection on disk.

    Args:
      block: the layer's module, e.g. "model.layers.{i}.mlp".
      gate, up, down: names of an expert's projections.
    """
    return (
        transposed(f"{block}.gate.weight", "layers/{i}/router/kernel"),
        *(transposed(f"{block}.experts.{{e}}.{name}.weight", f"layers/{{i}}/experts/{ours}")
          for name, ours in ((gate, "gate"), (up, "up"), (down, "down"))),
    )
