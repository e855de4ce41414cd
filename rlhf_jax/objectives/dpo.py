"""DPO: direct preference optimisation, a reward model and its optimal policy in one classification loss.

    L = −log σ( β [log π(y_w|x) − log π_ref(y_w|x)]  −  β [log π(y_l|x) − log π_ref(y_l|x)] )

Use: the first choice on preference pairs: no reward model, no sampling, one hyper-parameter.
See: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290).
Deviation: none; a response's log-prob is the sum over its tokens.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.1}
RANGES = {"beta": (1e-6, math.inf)}


def dpo_loss(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """Unreduced loss, [B] nats.

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      beta: inverse temperature of the implicit reward, > 0.

    See: Rafailov et al. 2023, eq. 7.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, keys, "dpo")
    losses = dpo_loss(ratios[:, 0], ratios[:, 1], beta=beta)
    return {"dpo": Mean.of(losses, batch.real)}, pair_metrics(logps, beta * ratios, batch)
