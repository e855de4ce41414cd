"""Operations of a program, counted in what was traced: 2·M·N·K of every matrix product, a loop's body as often as it runs.

This is ours, not the compiler's, whose `cost_analysis` counts a loop's body once. Elementwise work is not counted, and a kernel (pallas_call) counts
its products by its grid. `executed` counts what remat does a second time; `model` is the same program traced without remat. A `while_loop`'s number
of runs is not in the program: the caller says it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend


def flops(jaxpr: Any, loops: int = 1) -> float:
    """Multiply-adds × 2 of the matrix products, over all devices together.

    Args:
      jaxpr: closed or open, e.g. `jitted.trace(*args).jaxpr`.
      loops: how often the body of a while_loop runs.
    """
    return sum(_equation(eqn, loops) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation(eqn: Any, loops: int) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    if name in ("ragged_dot_general", "ragged_dot"):
        left, right = (v.aval.shape for v in eqn.invars[:2])
        return 2.0 * math.prod(left) * right[-1]
    if name == "scan":
        return params["length"] * flops(params["jaxpr"], loops)
    if name == "while":  # one within it shares its runs: the sampler goes through its tokens chunk by chunk
        return loops * flops(params["body_jaxpr"])
    if name == "cond":
        return max(flops(branch, loops) for branch in params["branches"])
    if name == "pallas_call":
        return math.prod(int(n) for n in params["grid_mapping"].grid) * flops(params["jaxpr"], loops)
    inner = sum(flops(body, loops) for body in _bodies(params))
    return inner * math.prod(params["mesh"].shape.values()) if name == "shard_map" else inner  # its shapes are one device's


def _bodies(params: dict[str, Any]) -> Iterator[Any]:
    """The programs among an operation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)):
                yield one
