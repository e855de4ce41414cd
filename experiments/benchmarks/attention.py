"""Query blocks against all logits at once, attention alone, forward and gradient: milliseconds and their ratio, one JSON line per length of rows.

The shape is W1's (8 query and 4 key heads of 32 features, float32), 2048 tokens in as many rows as that makes; both are jitted, and alternate in one
process; medians. `steps` is models/causal.py's on a CPU, with each size of `--sizes`. `temp` is what the compiled program holds besides
arguments and results, MiB.

    python experiments/benchmarks/attention.py --sizes 64,128,256,512
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from rlhf_jax.cli.main import script
from rlhf_jax.models import attention, causal

TOKENS, HEADS, GROUPS, DIM, WARM = 2048, 8, 4, 32, 2

flags.DEFINE_list("lengths", ["256", "512", "1024", "2048", "4096"], "tokens of a row")
flags.DEFINE_list("sizes", ["64", "128", "256", "512"], "queries of a block")
flags.DEFINE_integer("window", 0, "tokens that a query sees; 0 = all")
flags.DEFINE_integer("repeats", 20, "timed calls of each kind")


def whole(query: Any, key: Any, value: Any, segment_ids: Any, how: causal.How) -> Any:
    """All logits at once."""
    mask = attention.within(attention.visibility(segment_ids), 0, how.window)
    return attention.attend(query, key, value, mask, scale=how.scale, softcap=how.softcap)


def gradient(fn: Any, *arguments: Any) -> Any:
    """The compiled forward and backward pass of a function of queries, keys, values and segments."""
    loss = lambda q, k, v, ids: jnp.square(fn(q, k, v, ids)).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()


def main(_: list[str]) -> None:
    """Times every length."""
    options = flags.FLAGS
    how = causal.How(DIM**-0.5, options.window, 0.0)
    for length in map(int, options.lengths):
        rows = max(TOKENS // length, 1)
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = [jax.random.normal(key, (rows, length, heads, DIM)) for key, heads in zip(keys, (HEADS, GROUPS, GROUPS), strict=True)]
        arguments = (*arrays, jnp.ones((rows, length), jnp.int32))
        kinds = {"whole": functools.partial(whole, how=how)}
        for size in map(int, options.sizes):
            if size < length:
                kinds[f"steps of {size}"] = functools.partial(causal.stairs, how=how, size=size)
        programs = {name: gradient(fn, *arguments) for name, fn in kinds.items()}
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _step in range(WARM + options.repeats):
            for name, run in programs.items():
                before = time.perf_counter()
                jax.block_until_ready(run(*arguments))
                times[name].append(time.perf_counter() - before)
        median = {name: statistics.median(found[WARM:]) for name, found in times.items()}
        print(json.dumps({
            "length": length, "rows": rows, "window": options.window,
            **{f"{name}, ms": round(1e3 * value, 2) for name, value in median.items()},
            **{f"whole/{name}": round(median["whole"] / value, 2) for name, value in median.items() if name != "whole"},
            "temp": {name: round(run.memory_analysis().temp_size_in_bytes / 2**20, 1) for name, run in programs.items()},
            "backend": jax.default_backend(), "jax": jax.__version__,
        }), flush=True)


if __name__ == "__main__":
    script(main)
