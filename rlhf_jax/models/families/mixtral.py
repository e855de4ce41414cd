"""Mixtral: Mistral whose every layer is a mixture of experts; the chosen experts' weights always sum to 1."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._shared import read_llama, read_window, write_head, write_llama
from rlhf_jax.models.families._tables import ATTENTION, ENDS, INVERSE_FREQUENCIES, LAYER, PRE_NORMS, experts

MODEL_TYPES = ("mixtral",)
CLASSES = {"lm": "MixtralForCausalLM", "score": "MixtralForSequenceClassification"}
FRESH: dict[str, Any] = {"balance_coef": 0.001}
ROWS = (*ENDS, *PRE_NORMS, *ATTENTION, *experts(LAYER + "block_sparse_moe", gate="w1", up="w3", down="w2"))
IGNORED = (INVERSE_FREQUENCIES,)
RENAMED: tuple[tuple[str, str], ...] = ()
WHOLE_HEADS = False


def read(keys: Keys) -> dict[str, Any]:
    """Fields of a ModelConfig."""
    keys.require("attention_bias", None, False)
    keys.skip("router_jitter_noise")  # of training
    fields, count = read_llama(keys, kv_heads=8, norm_eps=1e-5, theta=1e6), keys.whole("num_local_experts", 8)
    if count < 1:
        raise keys.refusal("num_local_experts", "must be at least 1")
    return fields | {
        "windows": (read_window(keys, 0),), "experts": count, "expert_mlp": fields["mlp"],
        "experts_per_token": keys.whole("num_experts_per_tok", 2), "balance_coef": keys.number("router_aux_loss_coef", 0.001),
    }


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """Keys of config.json."""
    return write_head(config, MODEL_TYPES[0], CLASSES) | write_llama(config, stated) | {
        "intermediate_size": config.expert_mlp or config.mlp, "sliding_window": config.windows[0] or None, "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token, "router_aux_loss_coef": config.balance_coef,
    }
