"""DPO-NORM: DPO on log-ratios per token, so that a long response is no better way to a large margin than a short one.

    L = −log σ( β/|y_w| · log π(y_w|x)/π_ref(y_w|x)  −  β/|y_l| · log π(y_l|x)/π_ref(y_l|x) )

Use: DPO that makes responses longer and longer; β is some 50 times DPO's.
See: Lambert et al. 2024, Tülu 3 (arXiv:2411.15124); Meng et al. 2024, SimPO, appendix (arXiv:2405.14734).
Deviation: none; TRL calls it "sigmoid_norm".
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.objectives._pairs import pair_metrics, token_reading
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.ops.masking import masked_mean, masked_sum
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 5.0}
RANGES = {"beta": (1e-6, math.inf)}


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """DPO's loss on the mean log-ratio of each response's tokens.

    Args:
      beta: inverse temperature of the implicit reward per token, > 0.
    """
    logps, ratios, mask = token_reading(nets, batch, keys, "dpo_norm")
    means = masked_mean(ratios, mask)
    losses = dpo_loss(means[:, 0], means[:, 1], beta=beta)
    return {"dpo_norm": Mean.of(losses, batch.real)}, pair_metrics(masked_sum(logps, mask), beta * means, batch)
