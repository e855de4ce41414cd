"""config.json read key by key: every value is of the type that is asked for, every complaint names the key, and what nobody asked for is kept.

A family's `read` asks for the keys that it understands. A key that changes what a model computes and that no family understands is refused, keys
that cannot change it are passed over, and the rest is `left`, for a warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import UserError

NEEDED: Any = object()  # the default of a key that has none
AS_MISSING: Any = object()

# Bookkeeping, training and generation: nothing that a forward pass without dropout computes depends on these.
HARMLESS = re.compile(
    r"_.*|model_type|architectures|auto_map|transformers_version|(torch_)?dtype|tokenizer_class|prefix|task_specific_params|finetuning_task"
    r"|id2label|label2id|num_labels|problem_type|.*_token_ids?|.*dropout.*|.*_pdrop|output_.*|summary_.*|(use_)?return_dict.*|use_cache"
    r"|cache_implementation|attn_implementation|experts_implementation|initializer_(range|factor)|gradient_checkpointing|chunk_size_feed_forward"
    r"|is_decoder|torchscript|use_bfloat16|tf_legacy_loss|tie_encoder_decoder|cross_attention_hidden_size|decoder_start_token_id"
    r"|do_sample|temperature|top_[kp]|typical_p|epsilon_cutoff|eta_cutoff|(max|min)(_new)?_(length|tokens)|num_beams|num_beam_groups|num_return_sequences"
    r"|early_stopping|diversity_penalty|repetition_penalty|length_penalty|(encoder_)?no_repeat_ngram_size|bad_words_ids|suppress_tokens"
    r"|begin_suppress_tokens|remove_invalid_values|exponential_decay_length_penalty"
)
# What changes the computation and is nowhere built here, with the values that mean "off".
REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,), "per_layer_config": (None,), "pruned_heads": (None, {}), "pretraining_tp": (None, 1),
    "is_encoder_decoder": (None, False), "add_cross_attention": (None, False), "use_bidirectional_attention": (None, False),
    "clip_qkv": (None,), "qk_layernorm": (None, False), "use_mrope": (None, False), "alibi": (None, False),
    "no_rope_layers": (None,), "attention_chunk_size": (None,),
    "attention_multiplier": (None,), "embedding_multiplier": (None, 1), "residual_multiplier": (None, 1), "logits_scaling": (None, 1),
}


class Keys:
    """A mapping of config.json, or one inside it, and which of its keys were asked for."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json", prefix: str = "") -> None:
        self.notes: list[str] = []  # what the user should know about how it was read
        self._values, self._where, self._prefix = values, where, prefix
        self._asked: set[str] = set()
        self._sections: dict[str, Keys] = {}
        for key, neutral in REFUSED.items():
            self.require(key, *neutral)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    @property
    def left(self) -> list[str]:
        """Keys that nobody asked for and that are not known to be harmless, those of sections as "section.key"."""
        own = [self._prefix + key for key in self._values if key not in self._asked and not HARMLESS.fullmatch(key)]
        return sorted(own + [key for section in self._sections.values() for key in section.left])

    def refusal(self, key: str, problem: str) -> UserError:
        """The error for a key's value.

        Args:
          key: a key, given or not.
          problem: what is wrong and the remedy.
        """
        return UserError(f"{self._where}: {self._prefix}{key} = {self._values.get(key)!r}: {problem}")

    def skip(self, *keys: str) -> None:
        """Marks keys as understood whose values do not matter."""
        self._asked.update(keys)

    def require(self, key: str, *neutral: Any) -> None:
        """Refuses a key unless it is missing or has one of these values.

        Raises:
          UserError: with the key and the value.
        """
        self._asked.add(key)
        if key in self._values and not any(self._values[key] == value and _alike(self._values[key], value) for value in neutral):
            legal = " or ".join(repr(value) for value in neutral)
            raise self.refusal(key, f"this network computes the same as transformers only where it is {legal}")

    def whole(self, key: str, default: Any = NEEDED, null: Any = AS_MISSING) -> int:
        """An integer.

        Args:
          key: its name.
          default: where it is missing.
          null: where it is null; as where it is missing, unless given.

        Raises:
          UserError: needed and missing, or of another type.
        """
        value = self._typed(key, default, null, lambda x: isinstance(x, int) and not isinstance(x, bool), "an integer")
        if isinstance(value, int) and abs(value) >= 2**31:
            raise self.refusal(key, "no size is so large; download it again")
        return value

    def number(self, key: str, default: Any = NEEDED, null: Any = AS_MISSING) -> float:
        """A finite number, as `whole`."""
        value = self._typed(key, default, null, _is_number, "a finite number")
        return float(value) if _is_number(value) else value

    def maybe(self, key: str) -> float | None:
        """A finite number, or None where it is missing or null."""
        return self.number(key, None)

    def flag(self, key: str, default: Any = NEEDED) -> bool:
        """True or false, as `whole`."""
        return self._typed(key, default, AS_MISSING, lambda x: isinstance(x, bool), "true or false")

    def text(self, key: str, default: Any = NEEDED) -> str:
        """A string, as `whole`."""
        return self._typed(key, default, AS_MISSING, lambda x: isinstance(x, str), "a string")

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers, which must be there."""
        ok = lambda x: isinstance(x, list) and all(_is_number(y) for y in x)  # noqa: E731
        return tuple(float(x) for x in self._typed(key, NEEDED, AS_MISSING, ok, "a list of numbers"))

    def wholes(self, key: str) -> tuple[int, ...]:
        """A list of integers; empty where it is missing or null."""
        ok = lambda x: isinstance(x, list) and all(_is_whole(y) for y in x)  # noqa: E731
        return tuple(self._typed(key, [], AS_MISSING, ok, "a list of integers"))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty where it is missing or null."""
        ok = lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x)  # noqa: E731
        return tuple(self._typed(key, [], AS_MISSING, ok, "a list of strings"))

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A mapping; empty where it is missing or null."""
        return self._typed(key, {}, AS_MISSING, lambda x: isinstance(x, Mapping), "a mapping")

    def section(self, key: str) -> Keys | None:
        """A mapping whose keys are read in their turn; None where it is missing, null or empty."""
        if (values := self.mapping(key)) and key not in self._sections:
            self._sections[key] = Keys(values, self._where, f"{self._prefix}{key}.")
        return self._sections.get(key)

    def agreed(self, sources: list[tuple[Keys, str]], default: float) -> float:
        """The one number that several keys state, or `default` where none does.

        Args:
          sources: sections and their keys.
          default: the family's.

        Raises:
          UserError: two of them differ.
        """
        stated = [(f"{keys._prefix}{key}", value) for keys, key in sources if (value := keys.maybe(key)) is not None]
        for name, value in stated[1:]:
            if value != stated[0][1]:
                raise UserError(f"{self._where}: {stated[0][0]} = {stated[0][1]:g} and {name} = {value:g} contradict each other: keep one of them")
        return stated[0][1] if stated else default

    def _typed(self, key: str, default: Any, null: Any, legal: Any, kind: str) -> Any:
        self._asked.add(key)
        value = self._values.get(key)
        if value is None:
            value = null if key in self._values and null is not AS_MISSING else default
            if value is NEEDED:
                raise UserError(f"{self._where} lacks {self._prefix}{key}: it must be {kind}")
            return value
        if not legal(value):
            raise self.refusal(key, f"must be {kind}, got {type(value).__name__}")
        return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # in Python's arithmetic: an int may have any size


def _alike(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool)
