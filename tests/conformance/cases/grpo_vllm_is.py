"""Weights old/sampler: `<level>_<truncate|mask>__min<low>_max<high>`, None being no bound."""

from __future__ import annotations

import math

import jax.numpy as jnp

from rlhf_jax.ops.importance import CORRECTIONS
from tests.conformance.runner import Comparison, NoFunction


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("ratio/")]


def _case(v, name):
    kind, _, bounds = name.partition("__")
    if kind not in CORRECTIONS:
        raise NoFunction(kind)
    low, high = bounds.removeprefix("min").split("_max")
    mask = jnp.asarray(v["mask"]) != 0
    got = CORRECTIONS[kind](
        jnp.asarray(v["old_logps"]) - jnp.asarray(v["sampling_logps"]), mask, correction_low=0.0 if low == "None" else float(low),
        correction_high=math.inf if high == "None" else float(high),
    )
    yield Comparison("weights", got, v[f"ratio/{name}"])
