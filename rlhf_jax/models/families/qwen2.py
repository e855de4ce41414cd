"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._shared import read_llama, read_switched_windows, write_head, write_llama, write_switched_windows
from rlhf_jax.models.families._tables import ATTENTION, ENDS, INVERSE_FREQUENCIES, MLP, PRE_NORMS

MODEL_TYPES = ("qwen2",)
CLASSES = {"lm": "Qwen2ForCausalLM", "score": "Qwen2ForSequenceClassification"}
FRESH: dict[str, Any] = {"qkv_bias": True}
ROWS = (*ENDS, *PRE_NORMS, *ATTENTION, *MLP)
IGNORED = (INVERSE_FREQUENCIES,)
RENAMED: tuple[tuple[str, str], ...] = ()
WHOLE_HEADS = False


def read(keys: Keys) -> dict[str, Any]:
    """Fields of a ModelConfig."""
    fields = read_llama(keys, kv_heads=32, norm_eps=1e-6)
    return fields | {"qkv_bias": True, "windows": read_switched_windows(keys, fields["layers"])}


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """Keys of config.json."""
    return write_head(config, MODEL_TYPES[0], CLASSES) | write_llama(config, stated) | write_switched_windows(config)
