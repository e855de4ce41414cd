"""EXO: the reverse KL from the policy's preference between the two responses to the smoothed label, where DPO takes the forward KL.

    L = KL( p ‖ q ) = σ(h) [log σ(h) − log(1 − ε)] + σ(−h) [log σ(−h) − log ε]
    h = β [ log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) ]

Use: a policy that should seek the best response rather than cover all that are good.
See: Ji et al. 2024, eq. 16 (arXiv:2402.00856).
Deviation: none; two responses (EXO-pref), β is the paper's β_π.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.5, "epsilon": 1e-3}
RANGES = {"beta": (1e-6, math.inf), "epsilon": (1e-6, 0.5)}


def exo_loss(chosen: Array, rejected: Array, *, beta: float, epsilon: float) -> Array:
    """Unreduced loss, [B] nats, ≥ 0 but for rounding.

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      beta: inverse temperature of the implicit reward, > 0.
      epsilon: ε, the label's probability that the other response is the better one, (0, 0.5]; at 0 the KL is infinite.

    See: Ji et al. 2024, eq. 16.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    margin = beta * (chosen - rejected)
    better = jax.nn.sigmoid(margin) * (jax.nn.log_sigmoid(margin) - math.log1p(-epsilon))
    return better + jax.nn.sigmoid(-margin) * (jax.nn.log_sigmoid(-margin) - math.log(epsilon))


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, epsilon: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, keys, "exo")
    losses = exo_loss(ratios[:, 0], ratios[:, 1], beta=beta, epsilon=epsilon)
    return {"exo": Mean.of(losses, batch.real)}, pair_metrics(logps, beta * ratios, batch)
