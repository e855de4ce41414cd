"""APO-zero: anchored preference optimisation that raises the better response above the reference's likelihood and lowers the other below.

    L = 1 − σ( r_w ) + σ( r_l ),   r = β log π(y|x)/π_ref(y|x)

Use: the chosen responses are better than what the policy writes by itself.
See: D'Oosterlinck et al. 2024, eq. 7 (arXiv:2408.06266).
Deviation: none but the constant 1, which keeps the loss positive, as in TRL.
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


def apo_zero_loss(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """Unreduced loss, [B] in [0, 2].

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      beta: inverse temperature of the implicit reward, > 0.

    See: D'Oosterlinck et al. 2024, eq. 7.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, keys, "apo_zero")
    losses = apo_zero_loss(ratios[:, 0], ratios[:, 1], beta=beta)
    return {"apo_zero": Mean.of(losses, batch.real)}, pair_metrics(logps, beta * ratios, batch)
