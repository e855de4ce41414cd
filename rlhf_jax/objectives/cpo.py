"""CPO: contrastive preference optimisation: DPO's loss without a reference, and the likelihood of the better response.

    L = −(1 − ε) log σ( h ) − ε log σ( −h ) − α log π(y_w|x),   h = β [ log π(y_w|x) − log π(y_l|x) ]

Use: pairs of nearly perfect responses (translations), and no memory for a reference.
See: Xu et al. 2024, eq. 3 (arXiv:2401.08417).
Deviation: none with nll = "sum", the paper's −log π(y_w|x); its code takes the mean over all chosen tokens of the batch, to which "mean", over
each response, is near. ε is cDPO's label smoothing, 0 in the paper. TRL's "hinge" and "ipo" are hinge_loss and ipo_loss of the same arguments.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.objectives._pairs import REDUCTIONS, pair_metrics, policy_reading
from rlhf_jax.objectives.cdpo import cdpo_loss
from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.types import Array, Comparisons, Mean

DEFAULTS = {"beta": 0.1, "alpha": 1.0, "nll": "sum", "epsilon": 0.0}
RANGES = {"beta": (1e-6, math.inf), "alpha": (0.0, math.inf), "epsilon": (0.0, 0.499), "nll": REDUCTIONS}


def loss(
    nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, alpha: float, nll: str, epsilon: float
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """cDPO's loss on log-probs, and a likelihood term.

    Args:
      alpha: weight of the chosen response's negative log-prob, ≥ 0.
      nll: how the chosen response's negative log-prob is reduced over its tokens: "sum", the paper's, or "mean".
    """
    logps, mask = policy_reading(nets, batch, keys)
    sums = masked_sum(logps, mask)
    likelihood = REDUCTIONS[nll](logps[:, 0], mask[:, 0])
    terms = {
        "cpo": Mean.of(cdpo_loss(sums[:, 0], sums[:, 1], beta=beta, epsilon=epsilon), batch.real),
        "nll": Mean.of(-alpha * likelihood, batch.real),
    }
    return terms, pair_metrics(sums, beta * sums, batch)
