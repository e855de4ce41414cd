"""AOT, UNPAIRED: the rewards of the chosen responses should dominate those of the rejected ones as distributions.

    L = mean over ranks i of −log σ( β [ u₍ᵢ₎ − v₍ᵢ₎ ] ),   u = log π(y_w|x)/π_ref(y_w|x),   v = log π(y_l|x)/π_ref(y_l|x)

Use: chosen and rejected responses that need not answer the same prompt, and noisy pairs; needs large batches.
See: Melnyk et al. 2024, the unpaired form with the logistic loss and hard sorting (arXiv:2406.05882).
Deviation: rows are re-paired once, by the policy as the batch is prepared, over the global batch; within an update on the whole batch that is
the paper's. A validation batch is sorted by itself. reward/* and logps/* are those of the data's own pairs, before the update.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.ops.transport import optimal_plan
from rlhf_jax.types import Array, Comparisons, Mean, PyTree

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.01}
RANGES = {"beta": (1e-6, math.inf)}


def repaired(batch: Comparisons, ratios: Array) -> Comparisons:
    """Each chosen response beside the rejected one whose log-ratio has the same rank.

    Args:
      batch: the pairs.
      ratios: log π(y|x) − log π_ref(y|x), [B, 2] nats.
    """
    chex.assert_shape([ratios, batch.seqs.tokens[..., 0]], (None, 2))
    seqs, real = batch.seqs, batch.real
    # A row of one branch is no pair, and two of them may not become one.
    seqs = seqs.replace(segment_ids=jnp.where(real[:, None, None], seqs.segment_ids, 0))
    order = optimal_plan(ratios[:, 0], ratios[:, 1], real)
    return Comparisons(seqs=jax.tree.map(lambda x: jnp.stack([x[:, 0], x[order, 1]], axis=1), seqs))


def prepare(nets: Any, batch: Comparisons, carry: PyTree, key: Array, *, beta: float) -> tuple[Comparisons, PyTree, dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, None, "aot_unpaired")
    return repaired(batch, ratios), carry, pair_metrics(logps, beta * ratios, batch)


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    _, ratios = pair_reading(nets, batch, keys, "aot_unpaired")
    return {"aot_unpaired": Mean.of(dpo_loss(ratios[:, 0], ratios[:, 1], beta=beta), batch.real)}, {}
