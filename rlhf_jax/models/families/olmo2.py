"""OLMo-2: each branch's output is normalised in place of its input, and query and key over all heads at once."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._shared import read_llama, write_head, write_llama
from rlhf_jax.models.families._tables import ATTENTION, ENDS, INVERSE_FREQUENCIES, MLP, POST_NORMS, QK_NORMS

MODEL_TYPES = ("olmo2",)
CLASSES = {"lm": "Olmo2ForCausalLM", "score": "Olmo2ForSequenceClassification"}
FRESH: dict[str, Any] = {"norm_placement": "post", "qk_norm": "full"}
ROWS = (*ENDS, *POST_NORMS, *ATTENTION, *QK_NORMS, *MLP)
IGNORED = (INVERSE_FREQUENCIES,)
RENAMED: tuple[tuple[str, str], ...] = ()
WHOLE_HEADS = False


def read(keys: Keys) -> dict[str, Any]:
    """Fields of a ModelConfig."""
    bias = keys.flag("attention_bias", False)
    return read_llama(keys, kv_heads=0, norm_eps=1e-5) | FRESH | {"qkv_bias": bias, "output_bias": bias}


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """Keys of config.json."""
    return write_head(config, MODEL_TYPES[0], CLASSES) | write_llama(config, stated) | {"attention_bias": config.qkv_bias}
