"""MPO: mixed preference optimisation: which response is better, how good each is by itself, and how to write the better one.

    L = w_p L_dpo + w_q L_bco + w_g · −log π(y_w|x) / |y_w|
    L_dpo = −log σ( r_w − r_l ),   L_bco = −log σ( r_w − δ ) − log σ( −(r_l − δ) ),   r = β log π(y|x)/π_ref(y|x)

Use: long reasoning, where DPO alone loses the ability to write a whole answer.
See: Wang et al. 2024, section 3.2 (arXiv:2411.10442); δ is BCO's (bco_pair), the mean of all rewards so far.
Deviation: δ is the mean of all rewards since the start, this batch's included, as in TRL's BCO; the paper calls it a moving average of previous
rewards. In TRL's MPO δ is 0, and the likelihood is the mean over all chosen tokens of the batch.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.objectives._pairs import ShiftedComparisons, pair_metrics, token_reading
from rlhf_jax.objectives.bco_pair import bco_pair_loss, with_shift
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.objectives.rpo import mean_nll
from rlhf_jax.ops import running
from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.types import Array, Comparisons, Mean, PyTree

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.1, "preference_weight": 0.8, "quality_weight": 0.2, "generation_weight": 1.0}
RANGES = {key: (1e-6 if key == "beta" else 0.0, math.inf) for key in DEFAULTS}


def init_carry(nets: Any) -> PyTree:
    return {"rewards": running.RunningMoments.empty()}


def prepare(nets: Any, batch: Comparisons, carry: PyTree, key: Array, *, beta: float) -> tuple[ShiftedComparisons, PyTree, dict[str, Mean]]:
    shifted, rewards = with_shift(nets, batch, carry["rewards"], "mpo", beta=beta)
    return shifted, {"rewards": rewards}, {"reward/std": Mean.of(rewards.std)}


def loss(
    nets: Any, batch: ShiftedComparisons, keys: Array | None, *, beta: float, preference_weight: float, quality_weight: float,
    generation_weight: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Three losses, weighted.

    Args:
      preference_weight: w_p of DPO's loss, ≥ 0.
      quality_weight: w_q of BCO's loss on both responses, ≥ 0.
      generation_weight: w_g of the chosen response's negative log-prob per token, ≥ 0.
    """
    logps, ratios, mask = token_reading(nets, batch, keys, "mpo")
    ratios = masked_sum(ratios, mask)
    chosen, rejected = ratios[:, 0], ratios[:, 1]
    terms = {
        "dpo": Mean.of(preference_weight * dpo_loss(chosen, rejected, beta=beta), batch.real),
        "bco_pair": Mean.of(quality_weight * bco_pair_loss(chosen, rejected, batch.shift, beta=beta), batch.real),
        "nll": Mean.of(generation_weight * mean_nll(logps[:, 0], mask[:, 0]), batch.real),
    }
    metrics = pair_metrics(masked_sum(logps, mask), beta * ratios, batch)
    return terms, metrics | {"reward/baseline": Mean.of(batch.shift, batch.real)}
