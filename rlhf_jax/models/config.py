"""What a network is: its sizes and how it is laid out, as one hashable value (static under jit, JSON in every checkpoint)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import UserError, nearest

OUTPUTS = ("lm", "value", "score")
REMAT = ("none", "full", "dots")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, RoPE, SwiGLU, grouped-query attention."""

    vocab_size: int  # tokens
    hidden: int
    layers: int
    heads: int
    kv_heads: int  # divides heads
    head_dim: int  # even
    mlp: int
    context: int  # tokens; the longest row that may be trained on or sampled
    rope_theta: float
    norm_eps: float
    tied: bool  # output matrix = embedding table
    dropout: float  # [0, 1), on embeddings and on both residual branches
    param_dtype: str  # of the trained parameters
    compute_dtype: str  # of activations; norms, softmax and log-probs are float32 whatever it is
    scan_layers: bool  # one compiled layer, scanned; False unrolls. The checkpoint is the same
    remat: str  # "none" | "full" | "dots": what the backward pass recomputes
    logits_chunk: int  # positions of a row whose logits exist at once; 0 = all
    outputs: tuple[str, ...] = ("lm",)  # heads: "lm", "value", "score"

    def __post_init__(self) -> None:
        def fail(key: str, problem: str) -> None:
            raise UserError(f"config.model.{key} = {getattr(self, key)!r}: {problem}")

        for key in ("vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "mlp", "context"):
            if getattr(self, key) < 1:
                fail(key, "must be at least 1")
        if self.heads % self.kv_heads:
            fail("kv_heads", f"must divide config.model.heads = {self.heads}")
        for key in ("rope_theta", "norm_eps"):
            if not getattr(self, key) > 0:
                fail(key, "must be above 0")
        if self.head_dim % 2:
            fail("head_dim", "must be even, because RoPE rotates pairs of features")
        if not 0.0 <= self.dropout < 1.0:
            fail("dropout", "must lie in [0, 1)")
        if self.remat not in REMAT:
            fail("remat", f"must be one of {', '.join(REMAT)}")
        if self.logits_chunk < 0:
            fail("logits_chunk", "must be 0 (no chunking) or a number of positions")
        for key in ("param_dtype", "compute_dtype"):
            if getattr(self, key) not in DTYPES:
                fail(key, f"must be one of {', '.join(DTYPES)}")
        if not set(self.outputs) <= set(OUTPUTS):
            fail("outputs", f"must be drawn from {', '.join(OUTPUTS)}")

    @classmethod
    def create(cls, values: Mapping[str, Any], outputs: tuple[str, ...], where: str = "config.model") -> ModelConfig:
        """From a config section; an unknown or missing key is a user's error that names it.

        Args:
          values: every field but `outputs`.
          outputs: the heads this network needs.
          where: the section's name, for messages.

        Raises:
          UserError: unknown or missing keys, or a value out of range.
        """
        legal = {f.name for f in dataclasses.fields(cls)} - {"outputs"}
        for key in values:
            if key not in legal:
                raise UserError(f"{where}.{key} is not a model option{nearest(key, legal)}")
        missing = sorted(legal - set(values))
        if missing:
            raise UserError(f"{where} lacks {', '.join(missing)}: write every value out")
        kinds = {f.name: {"int": int, "float": float, "bool": bool, "str": str}[str(f.type)] for f in dataclasses.fields(cls) if f.name in legal}
        return cls(**{key: _typed(f"{where}.{key}", values[key], kind) for key, kind in kinds.items()}, outputs=tuple(outputs))

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint's meta."""
        return {**dataclasses.asdict(self), "outputs": list(self.outputs)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_json`."""
        return cls(**{**values, "outputs": tuple(values["outputs"])})

    def difference(self, other: ModelConfig) -> list[str]:
        """Names of the fields in which the parameters' shapes or meaning differ; layout and precision are not among them."""
        shapes = ("vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "mlp", "rope_theta", "norm_eps", "tied")
        return [key for key in shapes if getattr(self, key) != getattr(other, key)]


def _typed(key: str, value: Any, kind: type) -> Any:
    """`value` if it is of its field's type, an int made a float where a float is meant."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{key} = {value!r}: must be of type {kind.__name__}, got {type(value).__name__}")
    return value
