"""GPT-NeoX and Pythia: LayerNorm, both branches in parallel, part of a head rotated, query, key and value fused head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._rope import longest_context, read_rope, write_rope
from rlhf_jax.models.families._shared import ACTIVATION_NAMES, read_activation, write_head
from rlhf_jax.models.families._tables import INVERSE_FREQUENCIES, layer_norm, linear
from rlhf_jax.models.hf.rows import Row, same, transposed

MODEL_TYPES = ("gpt_neox",)
CLASSES = {"lm": "GPTNeoXForCausalLM", "score": "GPTNeoXForSequenceClassification"}
BUILD: dict[str, Any] = {"norm": "layer", "gated": False, "mlp_bias": True}
FRESH: dict[str, Any] = BUILD | {"norm_placement": "parallel", "activation": "gelu", "qkv_bias": True, "output_bias": True}
LAYER = "gpt_neox.layers.{i}."


def _fused(leaf: str, ours: str) -> Row:
    """[heads · 3 · head_dim, …]: each head's query, key and value lie together."""
    paths = tuple(f"layers/{{i}}/{name}/{ours}" for name in ("query", "key", "value"))

    def split(tensor: np.ndarray, config: ModelConfig) -> Sequence[np.ndarray]:
        parts = tensor.reshape(config.heads, 3, config.head_dim, *tensor.shape[1:])
        return [parts[:, n].reshape(-1, *tensor.shape[1:]).T for n in range(3)]

    def join(parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        turned = [part.T.reshape(config.heads, config.head_dim, *part.T.shape[1:]) for part in parts]
        return np.stack(turned, axis=1).reshape(-1, *turned[0].shape[2:])

    return Row(f"{LAYER}attention.query_key_value.{leaf}", paths, split, join)


ROWS = (
    same("gpt_neox.embed_in.weight", "ends/embedding"), *layer_norm("gpt_neox.final_layer_norm", "ends/norm"),
    transposed("embed_out.weight", "ends/lm_head"), transposed("score.weight", "ends/score_head/kernel"),
    *layer_norm(LAYER + "input_layernorm", "layers/{i}/attention_norm"), *layer_norm(LAYER + "post_attention_layernorm", "layers/{i}/mlp_norm"),
    _fused("weight", "kernel"), _fused("bias", "bias"), *linear(LAYER + "attention.dense", "layers/{i}/output"),
    *linear(LAYER + "mlp.dense_h_to_4h", "layers/{i}/up"), *linear(LAYER + "mlp.dense_4h_to_h", "layers/{i}/down"),
)
IGNORED = (INVERSE_FREQUENCIES, r".*\.attention\.(masked_)?bias$")  # the causal mask, a buffer of old checkpoints
RENAMED = ((r"^lm_head\.", "embed_out."),)  # transformers 5's own name, where a checkpoint was saved under it
WHOLE_HEADS = True


def read(keys: Keys) -> dict[str, Any]:
    """Fields of a ModelConfig."""
    hidden, heads, longest = keys.whole("hidden_size"), keys.whole("num_attention_heads"), keys.whole("max_position_embeddings")
    if heads < 1 or hidden % heads:
        raise keys.refusal("num_attention_heads", f"must divide hidden_size = {hidden}")
    keys.require("head_dim", None, hidden // heads)
    bias, parallel = keys.flag("attention_bias", True), keys.flag("use_parallel_residual", True)
    rope = read_rope(keys, hidden // heads, longest, theta_keys=("rotary_emb_base", "rope_theta"), partial=0.25,
                     partial_keys=("rotary_pct", "partial_rotary_factor"))
    return BUILD | rope | {
        "vocab_size": keys.whole("vocab_size"), "hidden": hidden, "layers": keys.whole("num_hidden_layers"), "heads": heads, "kv_heads": heads,
        "head_dim": hidden // heads, "mlp": keys.whole("intermediate_size"), "context": longest, "norm_eps": keys.number("layer_norm_eps", 1e-5),
        "tied": keys.flag("tie_word_embeddings", False), "activation": read_activation(keys, "hidden_act", "gelu"),
        "norm_placement": "parallel" if parallel else "pre", "qkv_bias": bias, "output_bias": bias,
    }


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """Keys of config.json."""
    longest = longest_context(config, stated)
    return write_head(config, MODEL_TYPES[0], CLASSES) | write_rope(config, longest, theta_key="rotary_emb_base", partial_key="rotary_pct") | {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden, "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "intermediate_size": config.mlp, "max_position_embeddings": longest, "layer_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied,
        "hidden_act": ACTIVATION_NAMES[config.activation], "use_parallel_residual": config.norm_placement == "parallel",
        "attention_bias": config.qkv_bias,
    }
