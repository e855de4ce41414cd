"""Mistral: Llama with a window on every layer, or none."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._shared import read_layer_types, read_llama, read_window, write_head, write_llama
from rlhf_jax.models.families._tables import ATTENTION, ENDS, INVERSE_FREQUENCIES, MLP, PRE_NORMS

MODEL_TYPES = ("mistral",)
CLASSES = {"lm": "MistralForCausalLM", "score": "MistralForSequenceClassification"}
FRESH: dict[str, Any] = {"windows": (4096,)}
ROWS = (*ENDS, *PRE_NORMS, *ATTENTION, *MLP)
IGNORED = (INVERSE_FREQUENCIES,)
RENAMED: tuple[tuple[str, str], ...] = ()
WHOLE_HEADS = False


def read(keys: Keys) -> dict[str, Any]:
    """Fields of a ModelConfig. transformers' Mistral passes over `layer_types`: a checkpoint that means them is of another family."""
    keys.require("attention_bias", None, False)
    fields, window = read_llama(keys, kv_heads=8, norm_eps=1e-6), read_window(keys, 4096)
    if (windows := read_layer_types(keys, fields["layers"], window, [window > 0] * fields["layers"])) != (window,):
        raise keys.refusal("layer_types", "transformers gives every layer of this family the same window: make them all alike")
    return fields | {"windows": windows}


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """Keys of config.json."""
    return write_head(config, MODEL_TYPES[0], CLASSES) | write_llama(config, stated) | {"sliding_window": config.windows[0] or None}
