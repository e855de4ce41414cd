"""Log-probs of a row: their sum and mean over the trained tokens, read one position to the left."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax.ops import vocab
from rlhf_jax.ops.masking import masked_mean, masked_sum
from tests.conformance.runner import Comparison


def cases(vectors):
    return [("sum and mean", lambda: _rows(vectors))]


def _rows(v):
    labels = jnp.asarray(v["labels"])[:, 1:]
    mask = labels != -100
    logps = vocab.logps(jnp.asarray(v["logits"])[:, :-1], jnp.where(mask, labels, 0))
    yield Comparison("sum", masked_sum(logps, mask), v["sum"])
    yield Comparison("mean", masked_mean(logps, mask), v["avg"])
