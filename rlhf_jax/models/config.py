"""What a network is: its sizes, its architecture and how it is laid out, as one hashable value (static under jit, JSON in every checkpoint).

One transformer serves every family: a family (`models/families/`) is a choice of these fields and a table of weight names. The defaults are
Llama's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import UserError, nearest

OUTPUTS = ("lm", "value", "score")
CHOICES: dict[str, tuple[str, ...]] = {
    "remat": ("none", "full", "dots", "offload"),
    "param_dtype": ("float32", "bfloat16"),
    "compute_dtype": ("float32", "bfloat16"),
    "norm": ("rms", "layer"),
    "norm_placement": ("pre", "post", "both", "parallel"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "qk_norm": ("none", "head", "full"),
    "position": ("rope", "learned"),
    "quantise": ("none", "int8", "nf4"),
}
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")  # what adapters may lie beside
SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope")
RUNTIME = ("context", "dropout", "param_dtype", "compute_dtype", "scan_layers", "remat", "logits_chunk")  # what a run chooses, not its checkpoint
REQUIRED = ("family", "vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "mlp", "rope_theta", "norm_eps", "tied", *RUNTIME)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How a model's rotary frequencies were stretched past the context that it was first trained with; `models/rope.py` has the equations."""

    kind: str  # one of SCALINGS
    factor: float = 1.0
    original_context: int = 0  # tokens; 0 = config.context
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the ramp's ends are whole dimensions
    attention_factor: float = 1.0  # yarn, longrope: multiplies cos and sin
    short_factors: tuple[float, ...] = ()  # longrope, one per frequency
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise UserError(f"rope scaling {self.kind!r} is not known here: only {', '.join(SCALINGS)} are")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters beside the frozen kernels; `models/lora.py` has the equations."""

    rank: int
    alpha: float  # the update is scaled by alpha / rank
    targets: str  # regular expression, searched for in the names of PROJECTIONS, e.g. "query|value"
    dropout: float = 0.0  # [0, 1), on an adapter's input
    rslora: bool = False  # scale by alpha / √rank instead
    dora: bool = False  # learn the kernel's column norms apart

    def __post_init__(self) -> None:
        if not self.projections:
            raise UserError(f"config.lora.targets = {self.targets!r} is found in none of {', '.join(PROJECTIONS)}: nothing would be adapted")

    @functools.cached_property
    def projections(self) -> tuple[str, ...]:
        """Names of those that have adapters."""
        return tuple(name for name in PROJECTIONS if re.search(self.targets, name))

    def alike(self, other: Lora | None) -> bool:
        """Whether leaves made for the one mean the same to the other: dropout and the pattern's wording may differ."""
        kind = lambda x: (x.rank, x.alpha, x.projections, x.rslora, x.dora)  # noqa: E731
        return other is not None and kind(self) == kind(other)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Layer i's kind is entry i mod len of the fields that are tuples."""

    family: str = "llama"  # a module of models/families
    vocab_size: int  # tokens, padding of the table included
    hidden: int
    layers: int
    heads: int
    kv_heads: int  # divides heads
    head_dim: int  # even where RoPE rotates it
    mlp: int
    context: int  # tokens; the longest row that may be trained on or sampled
    rope_theta: float
    norm_eps: float
    tied: bool  # output matrix = embedding table
    dropout: float  # [0, 1), on embeddings and on both residual branches
    param_dtype: str  # of the trained parameters
    compute_dtype: str  # of activations; norms, softmax and log-probs are float32 whatever it is
    scan_layers: bool  # one compiled layer of each kind, scanned; False unrolls. The checkpoint is the same
    # What the backward pass recomputes: "none" | "dots" all but the projections | "full" whole layers from their inputs | "offload" as full, and the
    # inputs wait in the host's memory. Each needs less of the device's memory than the one before and, dots and full, more time (up to a third).
    remat: str
    logits_chunk: int  # positions of a row whose logits exist at once; 0 = all
    outputs: tuple[str, ...] = ("lm",)  # heads: "lm", "value", "score"

    norm: str = "rms"  # "rms" | "layer" (mean subtracted, with a bias)
    norm_offset: bool = False  # gains are stored minus 1 (Gemma)
    norm_placement: str = "pre"  # "pre" | "post" (of a branch's output, OLMo-2) | "both" (Gemma 2) | "parallel" (both branches read x, NeoX)
    activation: str = "silu"
    gated: bool = True  # act(gate) · up; False: act(up) alone
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"  # "head": over head_dim (Qwen3) | "full": over all heads at once (OLMo-2)
    position: str = "rope"  # "rope" | "learned": a table of `positions` rows that is added to the embeddings
    positions: int = 0  # rows of that table
    rotary_dim: int = 0  # leading features of a head that RoPE rotates; 0 = all
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float = 0.0  # of layers with a window, unscaled; 0 = as the others (Gemma 3)
    windows: tuple[int, ...] = (0,)  # tokens that a query sees, itself included; 0 = all earlier ones
    attention_scale: float = 0.0  # of q·k; 0 = head_dim^−½
    attention_softcap: float = 0.0  # c·tanh(logit / c); 0 = off
    logits_softcap: float = 0.0  # of the output; 0 = off
    scaled_embedding: bool = False  # × √hidden, rounded to compute_dtype (Gemma)

    experts: int = 0  # 0 = dense
    experts_per_token: int = 0
    expert_mlp: int = 0
    renormalise: bool = True  # the chosen experts' weights sum to 1
    dense: tuple[bool, ...] = (False,)  # layers without experts, by repeating pattern
    balance_coef: float = 0.0  # of the load-balancing loss; 0 = off

    lora: Lora | None = None
    quantise: str = "none"  # frozen kernels as "int8" or "nf4"

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
        for key in ("rotary_dim", "head_dim"):
            if self.position == "rope" and getattr(self, key) % 2:
                fail(key, "must be even, because RoPE rotates pairs of features")
        if self.rotary_dim > self.head_dim:
            fail("rotary_dim", f"exceeds config.model.head_dim = {self.head_dim}")
        if not 0.0 <= self.dropout < 1.0:
            fail("dropout", "must lie in [0, 1)")
        if self.logits_chunk < 0:
            fail("logits_chunk", "must be 0 (no chunking) or a number of positions")
        for key, legal in CHOICES.items():
            if getattr(self, key) not in legal:
                fail(key, f"must be one of {', '.join(legal)}")
        if not set(self.outputs) <= set(OUTPUTS):
            fail("outputs", f"must be drawn from {', '.join(OUTPUTS)}")
        if self.position == "learned" and self.context > self.positions:
            fail("context", f"exceeds the {self.positions} positions of the model's table")
        scaling = self.rope_scaling
        if scaling and scaling.kind in ("dynamic", "longrope") and self.context > scaling.original_context:
            fail("context", f"{scaling.kind} rope scaling changes with the length of the text past {scaling.original_context} tokens, which a "
                            "compiled program does not know: stay within them")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            fail("experts_per_token", f"must lie between 1 and config.model.experts = {self.experts}")
        if self.experts and self.expert_mlp < 1:
            fail("expert_mlp", "must be at least 1 where there are experts")
        for key in ("windows", "dense"):
            if not getattr(self, key):
                fail(key, "needs at least one entry")
        if min(self.windows) < 0:
            fail("windows", "must be 0 (all earlier tokens) or a number of tokens")

    @property
    def rotary(self) -> int:
        """Features of a head that RoPE rotates."""
        return self.rotary_dim or self.head_dim

    def kind(self, layer: int) -> tuple[int, bool]:
        """(window, has experts) of a layer."""
        return self.windows[layer % len(self.windows)], self.experts > 0 and not self.dense[layer % len(self.dense)]

    @functools.cached_property
    def unit(self) -> int:
        """How many consecutive layers a layer scan repeats: the shortest period of their kinds; 0 where nothing repeats or layers are unrolled."""
        kinds = [self.kind(i) for i in range(self.layers)]
        period = next(u for u in range(1, self.layers + 1) if all(kinds[i] == kinds[i % u] for i in range(self.layers)))
        return period if self.scan_layers and self.layers >= 2 * period else 0

    @classmethod
    def create(cls, values: Mapping[str, Any], outputs: tuple[str, ...], where: str = "config.model") -> ModelConfig:
        """From a config section; an unknown or missing key is a user's error that names it.

        Args:
          values: the sizes and the run's own choices (REQUIRED); any other field where the family's value is not meant.
          outputs: the heads this network needs.
          where: the section's name, for messages.

        Raises:
          UserError: unknown or missing keys, or a value out of range.
        """
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in ("outputs", "lora")}
        for key in values:
            if key not in fields:
                raise UserError(f"{where}.{key} is not a model option{nearest(key, fields)}")
        if missing := sorted(set(REQUIRED) - set(values)):
            raise UserError(f"{where} lacks {', '.join(missing)}: write every value out")
        return cls(**{key: _typed(f"{where}.{key}", value, str(fields[key].type)) for key, value in values.items()}, outputs=tuple(outputs))

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint's meta."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_json`."""

        def tupled(section: Mapping[str, Any]) -> dict[str, Any]:
            return {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}

        plain = tupled(values)
        if scaling := plain.get("rope_scaling"):
            plain["rope_scaling"] = RopeScaling(**tupled(scaling))
        if lora := plain.get("lora"):
            plain["lora"] = Lora(**tupled(lora))
        return cls(**plain)

    def difference(self, other: ModelConfig) -> list[str]:
        """Names of the fields in which the parameters' shapes or meaning differ; layout, precision, heads and adapters are not among them."""
        own = (*RUNTIME, "outputs", "lora", "quantise", "balance_coef")
        return [f.name for f in dataclasses.fields(self) if f.name not in own and getattr(self, f.name) != getattr(other, f.name)]


def _typed(key: str, value: Any, kind: str) -> Any:
    """`value` if it is of its field's type, an int made a float where a float is meant."""
    if kind == "RopeScaling | None":
        return RopeScaling(**value) if isinstance(value, Mapping) else value
    if kind.startswith("tuple"):
        return tuple(value)
    want = {"int": int, "float": float, "bool": bool, "str": str}[kind]
    if want is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, want) or (isinstance(value, bool) and want is not bool):
        raise UserError(f"{key} = {value!r}: must be of type {want.__name__}, got {type(value).__name__}")
    return value
