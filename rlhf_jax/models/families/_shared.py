"""What the families' readers and writers of config.json share: sizes, windows, heads of the output, and the form of Llama's descendants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families._keys import Keys
from rlhf_jax.models.families._rope import longest_context, read_rope, write_rope

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh",
}
ACTIVATION_NAMES = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
WINDOW, ALL = "sliding_attention", "full_attention"


def read_activation(keys: Keys, key: str, default: str) -> str:
    """`activation` of a ModelConfig.

    Args:
      keys: config.json.
      key: the family's name for it.
      default: the family's where it is missing, transformers' name.
    """
    name = keys.text(key, default)
    if name not in ACTIVATIONS:
        raise keys.refusal(key, f"this activation is not built here; only {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[name]


def read_sizes(
    keys: Keys, *, kv_heads: int, norm_eps: float, tied: bool = False, activation: str = "silu", head_dim: int = 0, whole_heads: bool = False,
    activation_key: str = "hidden_act", defaults: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Fields of a ModelConfig that all of Llama's descendants name alike, and `context` = max_position_embeddings.

    Args:
      keys: config.json.
      kv_heads: the family's where it is missing; 0 = as many as heads.
      norm_eps: the family's where it is missing.
      tied: the family's where it is missing.
      activation: the family's where it is missing, transformers' name.
      head_dim: the family's where it is missing; 0 = hidden / heads.
      whole_heads: whether transformers refuses a hidden size that heads do not divide, even with a head_dim.
      activation_key: the family's name for it.
      defaults: sizes that may be missing.
    """
    sizes = {key: keys.whole(key, *((defaults[key],) if defaults and key in defaults else ())) for key in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")}
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    stated, groups = keys.whole("head_dim", head_dim or None, null=None), keys.whole("num_key_value_heads", kv_heads or heads, null=heads)
    if heads < 1 or (hidden % heads and (whole_heads or stated is None)):
        raise keys.refusal("num_attention_heads", f"must divide hidden_size = {hidden}")
    return {
        "vocab_size": sizes["vocab_size"], "hidden": hidden, "layers": sizes["num_hidden_layers"], "heads": heads,
        "kv_heads": groups, "head_dim": hidden // heads if stated is None else stated, "mlp": sizes["intermediate_size"],
        "context": sizes["max_position_embeddings"], "norm_eps": keys.number("rms_norm_eps", norm_eps),
        "tied": keys.flag("tie_word_embeddings", tied), "activation": read_activation(keys, activation_key, activation),
    }


def read_llama(keys: Keys, *, theta: float = 10000.0, **sizes: Any) -> dict[str, Any]:
    """Fields of a descendant of Llama that rotates whole heads: sizes and rotation.

    Args:
      keys: config.json.
      theta: the family's base where none is stated.
      sizes: arguments of `read_sizes`.
    """
    fields = read_sizes(keys, **sizes)
    return fields | read_rope(keys, fields["head_dim"], fields["context"], theta=theta)


def write_sizes(config: ModelConfig, longest: int, activation_key: str = "hidden_act") -> dict[str, Any]:
    """The inverse of `read_sizes`.

    Args:
      config: the network.
      longest: max_position_embeddings, tokens.
      activation_key: the family's name for it.
    """
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden, "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "intermediate_size": config.mlp, "max_position_embeddings": longest,
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied, activation_key: ACTIVATION_NAMES[config.activation],
    }


def write_llama(config: ModelConfig, stated: int) -> dict[str, Any]:
    """The inverse of `read_llama`.

    Args:
      config: the network.
      stated: max_position_embeddings when the model was imported, tokens; 0 = not known.
    """
    longest = longest_context(config, stated)
    return write_sizes(config, longest) | write_rope(config, longest)


def write_head(config: ModelConfig, model_type: str, classes: Mapping[str, str]) -> dict[str, Any]:
    """Which class of transformers' the model is, its dtype under both versions' names, and no special tokens, which the exporter knows.

    Args:
      config: the network.
      model_type: transformers' name of the family.
      classes: its class by output.
    """
    score = "score" in config.outputs
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if score else {}
    # Where they are missing, transformers takes its own for the family, which need not lie within this vocabulary.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {"architectures": [classes["score" if score else "lm"]], "model_type": model_type, "torch_dtype": config.param_dtype,
            "dtype": config.param_dtype, **tokens, **labels}


def repeating(values: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest pattern that, repeated and cut off, gives the sequence.

    Args:
      values: one entry per layer.
    """
    period = next((n for n in range(1, len(values)) if all(value == values[i % n] for i, value in enumerate(values))), len(values))
    return tuple(values[:period])


def read_window(keys: Keys, default: int) -> int:
    """`sliding_window`, tokens: a query sees keys less than so many positions back; 0 = all, which null means.

    Args:
      keys: config.json.
      default: the family's where it is missing.
    """
    window = keys.whole("sliding_window", default or None, null=None)
    if window is not None and window < 1:
        raise keys.refusal("sliding_window", "must be null (no window) or a number of tokens")
    return window or 0


def read_layer_types(keys: Keys, layers: int, window: int, default: Sequence[bool]) -> tuple[int, ...]:
    """`windows` of a ModelConfig.

    Args:
      keys: config.json.
      layers: how many.
      window: of the layers that have one, tokens; 0 = none has.
      default: for each layer, whether it has a window where `layer_types` is missing.
    """
    types = keys.texts("layer_types") or tuple(WINDOW if local else ALL for local in default)
    if len(types) != layers:
        raise keys.refusal("layer_types", f"must name num_hidden_layers = {layers} layers")
    if unknown := sorted(set(types) - {WINDOW, ALL}):
        raise keys.refusal("layer_types", f"layers of type {', '.join(unknown)} are not built here")
    if WINDOW in types and not window:
        raise keys.refusal("layer_types", "a layer has a window, but sliding_window or use_sliding_window says that there is none")
    return repeating([window if kind == WINDOW else 0 for kind in types])


def write_layer_types(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_layer_types`, with the one size of a window that transformers knows."""
    windows = [config.kind(i)[0] for i in range(config.layers)]
    return {"sliding_window": max(windows) or None, "layer_types": [WINDOW if window else ALL for window in windows]}


def read_switched_windows(keys: Keys, layers: int) -> tuple[int, ...]:
    """`windows` of Qwen, which has a switch for them and spares the first layers.

    Args:
      keys: config.json.
      layers: how many.
    """
    on = keys.flag("use_sliding_window", False)
    window, first = read_window(keys, 4096) if on else 0, keys.whole("max_window_layers", 28)
    keys.skip("sliding_window")
    return read_layer_types(keys, layers, window, [window > 0 and i >= first for i in range(layers)])


def write_switched_windows(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_switched_windows`."""
    windows = [config.kind(i)[0] for i in range(config.layers)]
    first = next((i for i, window in enumerate(windows) if window), config.layers)
    return {"use_sliding_window": any(windows), "max_window_layers": first, **write_layer_types(config)}
