"""Gemma 2: soft caps, windows on every other layer, norms before and after each branch, gains stored minus 1, scaled embeddings."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._rope import longest_context, read_rope, write_rope
from rlhf_jax.models.families._shared import read_layer_types, read_sizes, read_window, write_head, write_layer_types, write_sizes
from rlhf_jax.models.families._tables import ATTENTION, BOTH_NORMS, ENDS, INVERSE_FREQUENCIES, MLP

MODEL_TYPES = ("gemma2",)
CLASSES = {"lm": "Gemma2ForCausalLM", "score": "Gemma2ForSequenceClassification"}
BUILD: dict[str, Any] = {"norm_offset": True, "norm_placement": "both", "scaled_embedding": True}
FRESH: dict[str, Any] = BUILD | {"activation": "gelu_tanh", "windows": (4096, 0), "attention_softcap": 50.0, "logits_softcap": 30.0}
ROWS = (*ENDS, *BOTH_NORMS, *ATTENTION, *MLP)
IGNORED = (INVERSE_FREQUENCIES,)
RENAMED: tuple[tuple[str, str], ...] = ()
WHOLE_HEADS = True


def read(keys: Keys) -> dict[str, Any]:
    """Fields of a ModelConfig: the first layer has a window, the second sees everything, and so on."""
    fields = read_gemma(keys)
    layers = fields["layers"]
    return fields | read_rope(keys, fields["head_dim"], fields["context"]) | {
        "attention_softcap": keys.number("attn_logit_softcapping", 50.0, null=0.0),
        "logits_softcap": keys.number("final_logit_softcapping", 30.0, null=0.0),
        "windows": read_layer_types(keys, layers, read_window(keys, 4096), [i % 2 == 0 for i in range(layers)]),
    }


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """Keys of config.json."""
    longest = longest_context(config, stated)
    return write_head(config, MODEL_TYPES[0], CLASSES) | write_gemma(config, longest) | write_rope(config, longest) | {
        "attn_logit_softcapping": config.attention_softcap or None, "final_logit_softcapping": config.logits_softcap or None,
    }


def read_gemma(keys: Keys, **sizes: Any) -> dict[str, Any]:
    """What Gemma 2 and 3 share.

    Args:
      keys: config.json.
      sizes: arguments of `read_sizes`.
    """
    keys.skip("hidden_act")  # also in config.json, but `hidden_activation` is what transformers uses
    fields = read_sizes(keys, kv_heads=4, norm_eps=1e-6, tied=True, activation="gelu_pytorch_tanh", activation_key="hidden_activation",
                        head_dim=256, whole_heads=WHOLE_HEADS, **sizes) | BUILD
    bias, denominator = keys.flag("attention_bias", False), keys.number("query_pre_attn_scalar", 256.0)
    if not denominator > 0:
        raise keys.refusal("query_pre_attn_scalar", "must be above 0")
    scale = 0.0 if denominator == fields["head_dim"] else denominator**-0.5
    return fields | {"qkv_bias": bias, "output_bias": bias, "attention_scale": scale}


def write_gemma(config: ModelConfig, longest: int) -> dict[str, Any]:
    """The inverse of `read_gemma`, with the windows.

    Args:
      config: the network.
      longest: max_position_embeddings, tokens.
    """
    return write_sizes(config, longest, "hidden_activation") | write_layer_types(config) | {
        "attention_bias": config.qkv_bias, "query_pre_attn_scalar": round(config.attention_scale**-2) if config.attention_scale else config.head_dim,
    }
