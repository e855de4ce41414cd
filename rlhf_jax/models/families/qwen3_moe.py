"""Qwen3 with a mixture of experts in all layers, or in all but some."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._shared import read_llama, read_window, repeating, write_head, write_llama
from rlhf_jax.models.families._tables import ATTENTION, ENDS, INVERSE_FREQUENCIES, LAYER, MLP, PRE_NORMS, QK_NORMS, experts

MODEL_TYPES = ("qwen3_moe",)
CLASSES = {"lm": "Qwen3MoeForCausalLM", "score": "Qwen3MoeForSequenceClassification"}
FRESH: dict[str, Any] = {"qk_norm": "head", "renormalise": False, "balance_coef": 0.001}
ROWS = (*ENDS, *PRE_NORMS, *ATTENTION, *QK_NORMS, *MLP, *experts(LAYER + "mlp", gate="gate_proj", up="up_proj", down="down_proj"))
IGNORED = (INVERSE_FREQUENCIES,)
RENAMED: tuple[tuple[str, str], ...] = ()
WHOLE_HEADS = False


def read(keys: Keys) -> dict[str, Any]:
    """Fields of a ModelConfig. Its windows, if switched on, are on all layers: transformers passes over `max_window_layers` here."""
    fields, bias = read_llama(keys, kv_heads=4, norm_eps=1e-6), keys.flag("attention_bias", False)
    count = int(keys.agreed([(keys, "num_experts"), (keys, "num_local_experts")], 128))  # transformers 4's and 5's name
    plain, step = set(keys.wholes("mlp_only_layers")), keys.whole("decoder_sparse_step", 1)
    if step < 1:
        raise keys.refusal("decoder_sparse_step", "must be at least 1")
    keys.skip("max_window_layers")
    window = read_window(keys, 4096) if keys.flag("use_sliding_window", False) else 0
    keys.skip("sliding_window")
    return fields | {
        "qk_norm": "head", "qkv_bias": bias, "output_bias": bias, "windows": (window,), "experts": count,
        "experts_per_token": keys.whole("num_experts_per_tok", 8), "expert_mlp": keys.whole("moe_intermediate_size", 768),
        "renormalise": keys.flag("norm_topk_prob", False), "balance_coef": keys.number("router_aux_loss_coef", 0.001),
        "dense": repeating([i in plain or (i + 1) % step > 0 for i in range(fields["layers"])]),
    }


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """Keys of config.json."""
    return write_head(config, MODEL_TYPES[0], CLASSES) | write_llama(config, stated) | {
        "attention_bias": config.qkv_bias, "use_sliding_window": config.windows[0] > 0, "sliding_window": config.windows[0] or None,
        "num_experts": config.experts, "num_experts_per_tok": config.experts_per_token, "moe_intermediate_size": config.expert_mlp,
        "norm_topk_prob": config.renormalise, "router_aux_loss_coef": config.balance_coef, "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.layers) if not config.kind(i)[1]],
    }
