"""GPT-2: learned positions, LayerNorm, an ungated MLP, biases everywhere; kernels are stored [in, out] and query, key, value fused."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._shared import ACTIVATION_NAMES, read_activation, write_head
from rlhf_jax.models.families._tables import layer_norm
from rlhf_jax.models.hf.rows import Row, same, transposed

MODEL_TYPES = ("gpt2",)
CLASSES = {"lm": "GPT2LMHeadModel", "score": "GPT2ForSequenceClassification"}
BUILD: dict[str, Any] = {
    "norm": "layer", "gated": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True, "position": "learned",
}
FRESH: dict[str, Any] = BUILD | {"activation": "gelu_tanh", "positions": 1024}
LAYER = "transformer.h.{i}."


def _conv(theirs: str, ours: str) -> tuple[Row, Row]:
    """Kernel and bias of a Conv1D, which keeps [in, out] as we do."""
    return same(f"{theirs}.weight", f"{ours}/kernel"), same(f"{theirs}.bias", f"{ours}/bias")


def _fused(leaf: str, ours: str) -> Row:
    """Query, key and value one behind the other along the last axis."""
    paths = tuple(f"layers/{{i}}/{name}/{ours}" for name in ("query", "key", "value"))
    return Row(f"{LAYER}attn.c_attn.{leaf}", paths, lambda tensor, _: np.split(tensor, 3, axis=-1), lambda parts, _: np.concatenate(parts, axis=-1))


ROWS = (
    same("transformer.wte.weight", "ends/embedding"), same("transformer.wpe.weight", "ends/positions"),
    *layer_norm("transformer.ln_f", "ends/norm"), transposed("lm_head.weight", "ends/lm_head"), transposed("score.weight", "ends/score_head/kernel"),
    *layer_norm(LAYER + "ln_1", "layers/{i}/attention_norm"), *layer_norm(LAYER + "ln_2", "layers/{i}/mlp_norm"),
    _fused("weight", "kernel"), _fused("bias", "bias"), *_conv(LAYER + "attn.c_proj", "layers/{i}/output"),
    *_conv(LAYER + "mlp.c_fc", "layers/{i}/up"), *_conv(LAYER + "mlp.c_proj", "layers/{i}/down"),
)
IGNORED = (r".*\.attn\.(masked_)?bias$",)  # the causal mask, a buffer of old checkpoints
RENAMED = ((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),)  # OpenAI's own checkpoints were saved without the prefix
WHOLE_HEADS = True


def read(keys: Keys) -> dict[str, Any]:
    """Fields of a ModelConfig."""
    keys.skip("n_ctx")  # of old checkpoints; transformers uses n_positions
    keys.require("scale_attn_weights", True)
    keys.require("scale_attn_by_inverse_layer_idx", False)
    keys.require("reorder_and_upcast_attn", False)
    hidden, heads, positions = keys.whole("n_embd"), keys.whole("n_head"), keys.whole("n_positions")
    if heads < 1 or hidden % heads:
        raise keys.refusal("n_head", f"must divide n_embd = {hidden}")
    return BUILD | {
        "vocab_size": keys.whole("vocab_size"), "hidden": hidden, "layers": keys.whole("n_layer"), "heads": heads, "kv_heads": heads,
        "head_dim": hidden // heads, "mlp": keys.whole("n_inner", 4 * hidden), "context": positions, "positions": positions,
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5), "tied": keys.flag("tie_word_embeddings", True),
        "activation": read_activation(keys, "activation_function", "gelu_new"), "rope_theta": 10000.0,  # not used
    }


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """Keys of config.json."""
    activation = "gelu_new" if config.activation == "gelu_tanh" else ACTIVATION_NAMES[config.activation]
    return write_head(config, MODEL_TYPES[0], CLASSES) | {
        "vocab_size": config.vocab_size, "n_embd": config.hidden, "n_layer": config.layers, "n_head": config.heads, "n_inner": config.mlp,
        "n_positions": config.positions or config.context, "layer_norm_epsilon": config.norm_eps, "tie_word_embeddings": config.tied,
        "activation_function": activation,
    }
