"""Phi-3 and Phi-4-mini: fused projections, part of a head rotated, LongRoPE."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._rope import longest_context, read_rope, write_rope
from rlhf_jax.models.families._shared import read_sizes, read_window, write_head, write_sizes
from rlhf_jax.models.families._tables import DOWN, ENDS, INVERSE_FREQUENCIES, LAYER, OUTPUT, PRE_NORMS, fused

MODEL_TYPES = ("phi3",)
CLASSES = {"lm": "Phi3ForCausalLM", "score": "Phi3ForSequenceClassification"}
FRESH: dict[str, Any] = {}
ROWS = (
    *ENDS, *PRE_NORMS, *OUTPUT, *DOWN,
    fused(LAYER + "self_attn.qkv_proj.weight", ("layers/{i}/query/kernel", "layers/{i}/key/kernel", "layers/{i}/value/kernel")),
    fused(LAYER + "mlp.gate_up_proj.weight", ("layers/{i}/gate/kernel", "layers/{i}/up/kernel")),
)
IGNORED = (INVERSE_FREQUENCIES,)
RENAMED: tuple[tuple[str, str], ...] = ()
WHOLE_HEADS = False
KINDS = {"longrope": "longrope", "su": "longrope", "yarn": "longrope"}  # early checkpoints' names for it


def read(keys: Keys) -> dict[str, Any]:
    """Fields of a ModelConfig."""
    keys.require("attention_bias", None, False)
    fields = read_sizes(keys, kv_heads=0, norm_eps=1e-5)
    rope = read_rope(keys, fields["head_dim"], fields["context"], partial=1.0, kinds=KINDS, original=4096)
    return fields | rope | {"windows": (read_window(keys, 0),)}


def write(config: ModelConfig, stated: int = 0) -> dict[str, Any]:
    """Keys of config.json. transformers 4 wants a scaling's name as "type"."""
    longest = longest_context(config, stated)
    return write_head(config, MODEL_TYPES[0], CLASSES) | write_sizes(config, longest) | {"sliding_window": config.windows[0] or None} | write_rope(
        config, longest, partial_key="partial_rotary_factor", type_key="type")
