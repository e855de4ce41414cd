"""Rotary positions in config.json: transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`, and both are read.

A base or a scaling that is stated twice must be stated alike. What is written states it both ways, so that either version reads it. Where the two
versions differ about a scaling (YaRN's factor beside an original context), the meaning is transformers 5.23's.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.models.config import SCALINGS, ModelConfig, RopeScaling
from rlhf_jax.models.families._keys import Keys

ORIGINAL = "original_max_position_embeddings"


def read_rope(
    keys: Keys, head_dim: int, longest: int, *, theta: float = 10000.0, theta_keys: tuple[str, ...] = ("rope_theta",), partial: float = 0.0,
    partial_keys: tuple[str, ...] = ("partial_rotary_factor",), kinds: dict[str, str] | None = None, original: int = 0,
    tables: list[Keys] | None = None,
) -> dict[str, Any]:
    """`rope_theta`, `rotary_dim` and `rope_scaling` of a ModelConfig.

    Args:
      keys: config.json.
      head_dim: features of a head.
      longest: max_position_embeddings, tokens.
      theta: the family's base where none is stated.
      theta_keys: keys of config.json that state it.
      partial: the family's share of a head that is rotated where none is stated; 0 = all, and another share is refused.
      partial_keys: keys of config.json that state that share.
      kinds: names of scalings in this family and the kind that each is.
      original: the family's original context where none is stated, tokens; 0 = `longest`.
      tables: the sections that describe the rotation, if not `rope_parameters` and `rope_scaling`.

    Raises:
      UserError: contradictions, or a scaling that is not known.
    """
    if tables is None:
        tables = [table for name in ("rope_parameters", "rope_scaling") if (table := keys.section(name)) is not None]
    base = keys.agreed([(table, "rope_theta") for table in tables] + [(keys, key) for key in theta_keys], theta)
    share = keys.agreed([(table, "partial_rotary_factor") for table in tables] + [(keys, key) for key in partial_keys], partial or 1.0)
    if not partial and share != 1.0:
        raise keys.refusal(partial_keys[0], f"rope_parameters and this key rotate {share:g} of each head, but this family rotates whole heads")
    rotary = int(head_dim * share)
    known = {kind: kind for kind in SCALINGS} if kinds is None else kinds
    scalings = [_scaling(keys, table, rotary, longest, known, original) for table in tables]
    keys.skip(ORIGINAL)
    if any(scaling != scalings[0] for scaling in scalings):
        raise keys.refusal("rope_scaling", "contradicts rope_parameters: keep one of them")
    return {"rope_theta": base, "rotary_dim": 0 if rotary == head_dim else rotary, "rope_scaling": scalings[0] if scalings else None}


def _scaling(keys: Keys, table: Keys, rotary: int, longest: int, kinds: dict[str, str], original: int) -> RopeScaling | None:
    """One section's scaling."""
    names = {key: kinds.get(name, name) for key in ("rope_type", "type") if (name := table.text(key, ""))}
    kind = next(iter(names.values()), "default")
    if len(set(names.values())) > 1:
        raise table.refusal("type", f"contradicts rope_type = {names['rope_type']!r}: keep one of them")
    for key in ("full_attention", "sliding_attention", "mrope_section"):
        if key in table:
            raise table.refusal(key, "this family has one rotation for all of its layers and features")
    if kind == "default":
        return None
    if kind not in kinds.values():
        raise table.refusal(next(iter(names)), f"this rotation is not built for this family; only {', '.join(['default', *kinds])} is")
    if kind == "linear":
        return RopeScaling(kind=kind, factor=_factor(table))
    if kind == "dynamic":
        if table.whole(ORIGINAL, longest) != longest:
            raise table.refusal(ORIGINAL, f"dynamic scaling starts past max_position_embeddings = {longest} in transformers: make them equal")
        return RopeScaling(kind=kind, factor=_factor(table), original_context=longest)
    # A context beside the section rules over the one inside it in transformers, so that they may not differ.
    first = int(keys.agreed([(table, ORIGINAL), (keys, ORIGINAL)], original or longest))
    if original and first != keys.whole(ORIGINAL, original):
        raise table.refusal(ORIGINAL, f"write it beside the section too, or transformers takes {original}")
    if first < 1:
        raise keys.refusal(ORIGINAL, "must be above 0")
    if kind == "llama3":
        return RopeScaling(kind=kind, factor=_factor(table), original_context=first, low_frequency_factor=table.number("low_freq_factor"),
                           high_frequency_factor=table.number("high_freq_factor"))
    factor = _factor(table, longest / first)
    if kind == "yarn":
        mscale, mscale_all = table.number("mscale", 0.0), table.number("mscale_all_dim", 0.0)
        computed = _mscale(factor, mscale) / _mscale(factor, mscale_all) if mscale and mscale_all else _mscale(factor, 1.0)
        return RopeScaling(kind=kind, factor=factor, original_context=first, beta_fast=table.number("beta_fast", 32.0) or 32.0,
                           beta_slow=table.number("beta_slow", 1.0) or 1.0, truncate=table.flag("truncate", True),
                           attention_factor=table.number("attention_factor", computed))
    short, long = table.numbers("short_factor"), table.numbers("long_factor")
    for key, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != rotary // 2 or min(factors) <= 0:
            raise table.refusal(key, f"must be {rotary // 2} numbers above 0, one per rotated pair of features")
    return RopeScaling(kind=kind, factor=factor, original_context=first, short_factors=short, long_factors=long,
                       attention_factor=table.number("attention_factor", _long_factor(factor, first)))


def _factor(table: Keys, *default: float) -> float:
    factor = table.number("factor", *default)
    if not factor > 0:
        raise table.refusal("factor", "must be above 0")
    return factor


def _mscale(factor: float, scale: float) -> float:
    """YaRN's factor of cos and sin (Peng et al. 2023, eq. 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _long_factor(factor: float, original: int) -> float:
    """LongRoPE's factor of cos and sin."""
    return math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def longest_context(config: ModelConfig, stated: int) -> int:
    """`max_position_embeddings`, tokens: fixed by those scalings that are computed from it, else as `stated`, else the network's context.

    Args:
      config: the network.
      stated: what it was when the model was imported; 0 = not known.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind in ("dynamic", "yarn", "longrope"):
        return round((scaling.original_context or config.context) * (1.0 if scaling.kind == "dynamic" else max(scaling.factor, 1.0)))
    return max(stated, config.context)


def write_rope(
    config: ModelConfig, longest: int, *, theta_key: str = "rope_theta", partial_key: str = "", type_key: str = "rope_type"
) -> dict[str, Any]:
    """The keys of both schemas.

    Args:
      config: the network.
      longest: max_position_embeddings, tokens.
      theta_key: transformers 4's key for the base.
      partial_key: transformers 4's key for the rotated share of a head; "" = the family has none.
      type_key: transformers 4's key for a scaling's name.
    """
    share = {partial_key: _share(config)} if partial_key else {}
    named = {"partial_rotary_factor": _share(config)} if partial_key else {}
    scaling = _describe(config, longest)
    out = {theta_key: config.rope_theta, **share, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, **named, **scaling}}
    if scaling.get("rope_type") == "longrope":  # transformers 4 looks for it here
        out[ORIGINAL] = scaling.pop(ORIGINAL)
    out["rope_scaling"] = {type_key: scaling.pop("rope_type"), **scaling} if scaling else None
    return out


def _share(config: ModelConfig) -> float:
    """The share of a head that is rotated, such that its product with head_dim does not round down to less."""
    share = config.rotary / config.head_dim
    return share if int(config.head_dim * share) == config.rotary else math.nextafter(share, 1.0)


def _describe(config: ModelConfig, longest: int) -> dict[str, Any]:
    """A scaling's keys, transformers' names."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    original = scaling.original_context or config.context
    if scaling.kind in ("linear", "dynamic"):
        return {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        return {"rope_type": scaling.kind, "factor": scaling.factor, "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor, ORIGINAL: original}
    if scaling.kind == "yarn":
        return {"rope_type": scaling.kind, "factor": scaling.factor, ORIGINAL: original, "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    out = {"rope_type": scaling.kind, "short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors), ORIGINAL: original}
    # Phi-3 of transformers 4 takes the two lists alone and computes the rest: nothing is added that it would compute alike.
    if longest / original != scaling.factor or _long_factor(scaling.factor, original) != scaling.attention_factor:
        out |= {"factor": scaling.factor, "attention_factor": scaling.attention_factor}
    return out
