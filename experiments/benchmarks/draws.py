"""Inverting the distribution function against Gumbel noise: microseconds per draw and their ratio, one JSON line per vocabulary.

Both give the token and its log-prob, jitted, on the same logits, one key per row; `categorical` is jax.random.categorical with one key for all rows
and without a log-prob, the least that a sampler could do. Alternating in one run, medians.

    python experiments/benchmarks/draws.py --batch 16
"""

from __future__ import annotations

import json
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags

from rlhf_jax.cli.main import script
from rlhf_jax.ops import categorical

VOCABULARIES = (1024, 8192, 32768, 131072)
WARM = 3

flags.DEFINE_integer("batch", 16, "rows")
flags.DEFINE_integer("repeats", 40, "timed draws of each kind")


def main(_: list[str]) -> None:
    """Times the draws."""
    batch, repeats = flags.FLAGS.batch, flags.FLAGS.repeats
    kinds = {
        "inversion": jax.jit(categorical.inversion), "gumbel": jax.jit(categorical.gumbel),
        "categorical": jax.jit(lambda keys, logits: jax.random.categorical(keys[0], logits)),
    }
    for vocabulary in VOCABULARIES:
        logits = 3.0 * jax.random.normal(jax.random.key(1), (batch, vocabulary), jnp.float32)
        keys = jax.random.split(jax.random.key(0), batch)
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _step in range(WARM + repeats):
            for name, run in kinds.items():
                before = time.perf_counter()
                jax.block_until_ready(run(keys, logits))
                times[name].append(time.perf_counter() - before)
        median = {name: statistics.median(found[WARM:]) for name, found in times.items()}
        print(json.dumps({
            "vocabulary": vocabulary, "batch": batch, **{f"{name}_us": round(1e6 * value, 1) for name, value in median.items()},
            "gumbel/inversion": round(median["gumbel"] / median["inversion"], 2),
            "categorical/inversion": round(median["categorical"] / median["inversion"], 2), "backend": jax.default_backend(), "jax": jax.__version__,
        }))


if __name__ == "__main__":
    script(main)
