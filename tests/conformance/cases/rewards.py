"""Rule-based rewards: "think_format" on texts, "soft_overlong_<budget>_<cache>" on lengths."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax.ops.shaping import overlong_punishment
from rlhf_jax.rewards import rules
from tests.conformance.runner import Comparison, NoFunction


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors]


def _case(v, name):
    case = v[name]
    if name == "think_format":
        texts = case["inp"]
        yield Comparison("score", rules.think_format([None] * len(texts), texts, [None] * len(texts)), case["out"])
    elif name.startswith("soft_overlong_"):
        longest, buffer = map(int, name.removeprefix("soft_overlong_").split("_"))
        got = overlong_punishment(jnp.asarray(case["lengths"]), overlong_length=longest, overlong_buffer=buffer)
        yield Comparison("punishment", got, case["out"])
    else:
        raise NoFunction(name)
