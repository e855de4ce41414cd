"""Llama 2 and 3.x."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._shared import read_llama, write_head, write_llama
from rlhf_jax.models.families._tables import ATTENTION, ENDS, INVERSE_FREQUENCIES, MLP, PRE_NORMS

MODEL_TYPES = ("llama",)
CLASSES = {"lm": "LlamaForCausalLM", "score": "LlamaForSequenceClassification"}
FRESH: dict[str, Any] = {}
ROWS = (*ENDS, *PRE_NORMS, *ATTENTION, *MLP)
IGNORED = (INVERSE_FREQUENCIES,)
RENAMED: tuple[tuple[str, str], ...] = ()
WHOLE_HEADS = True


def read(keys: Keys) -> dict[str, Any]:
    """Fields of a ModelConfig; the attention's bias is on all four of its projections."""
    bias = keys.flag("attention_bias", False)
    return read_llama(keys, kv_heads=0, norm_eps=1e-6, whole_heads=WHOLE_HEADS) | {
        "qkv_bias": bias, "output_bias": bias, "mlp_bias": keys.flag("mlp_bias", False),
    }


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """Keys of config.json."""
    return write_head(config, MODEL_TYPES[0], CLASSES) | write_llama(config, stated) | {
        "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias,
    }
