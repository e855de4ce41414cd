"""AOT: the distribution of the policy's margins should dominate that of the reference's, as a whole and not pair by pair.

    L = mean over ranks i of −log σ( β [ u₍ᵢ₎ − v₍ᵢ₎ ] ),   u = log π(y_w|x)/π(y_l|x),   v = log π_ref(y_w|x)/π_ref(y_l|x)

Use: DPO's data where single pairs are noisy; needs batches that are large enough to stand for the distribution.
See: Melnyk et al. 2024, the paired form with the logistic loss and hard sorting (arXiv:2406.05882).
Deviation: the order is that of the policy as the batch is prepared, over the global batch; within an update on the whole batch it is the
paper's. A validation batch is sorted by itself.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.ops.transport import optimal_plan
from rlhf_jax.types import Array, Comparisons, Mean, PyTree

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.01}
RANGES = {"beta": (1e-6, math.inf)}


class RankedComparisons(Comparisons, kw_only=True):
    """Pairs, and the reference's margin of the same rank as the policy's."""

    ref_margin: Array  # [B] float32 nats


def prepare(nets: Any, batch: Comparisons, carry: PyTree, key: Array) -> tuple[RankedComparisons, PyTree, dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, None, "aot")
    margin, reference = logps[:, 0] - logps[:, 1], logps - ratios
    ref_margin = reference[:, 0] - reference[:, 1]
    matched = ref_margin[optimal_plan(margin, ref_margin, batch.real)]
    return RankedComparisons(seqs=batch.seqs, margin=batch.margin, ref_margin=matched), carry, {}


def loss(nets: Any, batch: RankedComparisons, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """DPO's loss on margins in place of log-ratios.

    Args:
      beta: how sharply a difference of margins counts, > 0.
    """
    logps, ratios = pair_reading(nets, batch, keys, "aot")
    losses = dpo_loss(logps[:, 0] - logps[:, 1], batch.ref_margin, beta=beta)
    return {"aot": Mean.of(losses, batch.real)}, pair_metrics(logps, beta * ratios, batch)
