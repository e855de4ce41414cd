"""Gemma 3, its text: Gemma 2 without soft caps, query and key normalised, and a second, unscaled rotation on the layers that have a window.

The checkpoints from 4B on also hold a vision tower (`Gemma3ForConditionalGeneration`): its text model alone is read, and written back as
`Gemma3ForCausalLM`, which computes the same of text.
"""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._rope import longest_context, read_rope, write_rope
from rlhf_jax.models.families._shared import read_layer_types, read_window, write_head
from rlhf_jax.models.families._tables import ATTENTION, BOTH_NORMS, ENDS, INVERSE_FREQUENCIES, MLP, QK_NORMS
from rlhf_jax.models.families.gemma2 import BUILD, read_gemma, write_gemma

MODEL_TYPES = ("gemma3_text", "gemma3")
CLASSES = {"lm": "Gemma3ForCausalLM", "score": "Gemma3TextForSequenceClassification"}
FRESH: dict[str, Any] = BUILD | {
    "activation": "gelu_tanh", "qk_norm": "head", "local_rope_theta": 10000.0, "windows": (512, 512, 512, 512, 512, 0),
}
ROWS = (*ENDS, *BOTH_NORMS, *ATTENTION, *QK_NORMS, *MLP)
IGNORED = (INVERSE_FREQUENCIES, r"(model\.)?(vision_tower|multi_modal_projector)\..*")
RENAMED = ((r"^language_model\.lm_head\.", "lm_head."), (r"^(model\.)?language_model\.(model\.)?", "model."))
WHOLE_HEADS = True
KINDS = {kind: kind for kind in ("linear", "llama3")}
# config.json of the models with vision states only what differs from these.
SIZES = {"vocab_size": 262208, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "intermediate_size": 9216,
         "max_position_embeddings": 131072}


def read(keys: Keys) -> dict[str, Any]:
    """Fields of a ModelConfig."""
    text, tied = keys.section("text_config"), keys.flag("tie_word_embeddings", True)
    if text is not None:
        keys.skip("vision_config", "mm_tokens_per_image")
        keys.skip("boi_token_index", "eoi_token_index", "image_token_index")
        keys.notes.append("only the text part of this model is read, without its vision tower")
        if text.flag("tie_word_embeddings", tied) != tied:
            raise text.refusal("tie_word_embeddings", f"contradicts tie_word_embeddings = {tied} outside text_config: make them equal")
    keys = text or keys
    fields = read_gemma(keys, defaults=SIZES)
    layers, every = fields["layers"], keys.whole("sliding_window_pattern", 6)
    if every < 1:
        raise keys.refusal("sliding_window_pattern", "must be at least 1")
    keys.require("attn_logit_softcapping", None)
    return fields | _rotations(keys, fields["head_dim"], fields["context"]) | {
        "qk_norm": "head", "tied": tied, "logits_softcap": keys.number("final_logit_softcapping", 0.0),
        "windows": read_layer_types(keys, layers, read_window(keys, 4096), [(i + 1) % every > 0 for i in range(layers)]),
    }


def _rotations(keys: Keys, head_dim: int, longest: int) -> dict[str, Any]:
    """Of the layers that see everything, and of those with a window."""
    nested, flat = keys.section("rope_parameters"), keys.section("rope_scaling")
    if nested is not None and "full_attention" not in nested and "sliding_attention" not in nested:
        raise keys.refusal("rope_parameters", "must hold one rotation for full_attention and one for sliding_attention, or transformers ignores it")
    if flat is not None and "rope_type" not in flat:
        raise flat.refusal("type", 'write it as "rope_type": transformers 5 ignores a scaling of this family that does not')
    whole = [table for table in (nested and nested.section("full_attention"), flat) if table]
    local = [table for table in (nested and nested.section("sliding_attention"),) if table]
    fields = read_rope(keys, head_dim, longest, theta=1e6, kinds=KINDS, tables=whole)
    second = read_rope(keys, head_dim, longest, theta=1e4, theta_keys=("rope_local_base_freq",), kinds={}, tables=local)
    return fields | {"local_rope_theta": second["rope_theta"]}


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """Keys of config.json."""
    longest = longest_context(config, stated)
    rope, theta = write_rope(config, longest), config.local_rope_theta or config.rope_theta
    return write_head(config, MODEL_TYPES[0], CLASSES) | write_gemma(config, longest) | rope | {
        "rope_local_base_freq": theta, "final_logit_softcapping": config.logits_softcap or None, "attn_logit_softcapping": None,
        "rope_parameters": {"full_attention": rope["rope_parameters"], "sliding_attention": {"rope_type": "default", "rope_theta": theta}},
    }
