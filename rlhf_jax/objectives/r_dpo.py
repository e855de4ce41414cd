"""R-DPO: DPO with a regulariser on length: a longer response needs less of the policy to be preferred.

    L = −log σ( β log π(y_w|x)/π_ref(y_w|x) − β log π(y_l|x)/π_ref(y_l|x) + α |y_w| − α |y_l| )

Use: preference data in which the longer response tends to be the chosen one.
See: Park et al. 2024 (arXiv:2403.19159).
Deviation: none.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax

from rlhf_jax.objectives._pairs import pair_metrics, token_reading
from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.1, "alpha": 0.01}
RANGES = {"beta": (1e-6, math.inf), "alpha": (0.0, math.inf)}


def r_dpo_loss(chosen: Array, rejected: Array, extra_length: Array, *, beta: float, alpha: float) -> Array:
    """Unreduced loss, [B] nats.

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      extra_length: |y_w| − |y_l|, [B] tokens.
      beta: inverse temperature of the implicit reward, > 0.
      alpha: reward that a token of length is taken to be worth to the annotators, and shall not be to the policy, ≥ 0.

    See: Park et al. 2024.
    """
    chex.assert_rank([chosen, rejected, extra_length], 1)
    chex.assert_equal_shape([chosen, rejected, extra_length])
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) + alpha * extra_length)


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, alpha: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios, mask = token_reading(nets, batch, keys, "r_dpo")
    ratios, lengths = masked_sum(ratios, mask), mask.sum(-1)
    losses = r_dpo_loss(ratios[:, 0], ratios[:, 1], lengths[:, 0] - lengths[:, 1], beta=beta, alpha=alpha)
    return {"r_dpo": Mean.of(losses, batch.real)}, pair_metrics(masked_sum(logps, mask), beta * ratios, batch)
