"""How far bfloat16 carries each family from float32: `python -m tests.models.families.precision` prints the table.

The error is |Δ log p|, nats, over every real token of the fixtures' rows and the whole vocabulary, against transformers' float32 logits. Weights and
activations are bfloat16, ours and theirs; these are models of random weights at unit gain, whose logits are as large as a trained model's and whose
layers correct nothing.
"""

from __future__ import annotations

import numpy as np
from jax.nn import log_softmax

from tests.models import tiny
from tests.models.families import golden


def error(name: str) -> np.ndarray:
    """[3] nats: mean, 99th percentile and maximum of a fixture's bfloat16 forward."""
    want = golden.expected(name)
    got = tiny.logits(*golden.network(name, scan_layers=False, param_dtype="bfloat16", compute_dtype="bfloat16"), golden.rows(want))
    wide, narrow = (np.asarray(log_softmax(x, axis=-1)) for x in (want["logits"], np.asarray(got)[want["segment_ids"] != 0]))
    gap = np.abs(wide - narrow)
    return np.array([gap.mean(), np.quantile(gap, 0.99), gap.max()])


def main() -> None:
    print("| fixture | mean | p99 | max | transformers: mean | p99 | max |\n|---|---|---|---|---|---|---|")
    for name in golden.POLICIES:
        print(f"| {name} |" + "".join(f" {value:.3f} |" for value in (*error(name), *golden.expected(name)["bfloat16_error"])))


if __name__ == "__main__":
    main()
