"""NCA: noise-contrastive alignment: the better response is told from samples of the reference, which keeps its likelihood from falling.

    L = −log σ( r_w ) − ½ log σ( −r_w ) − ½ log σ( −r_l ),   r = β log π(y|x)/π_ref(y|x)

Use: preference pairs where DPO lets the likelihood of the chosen responses fall, e.g. in reasoning.
See: Chen et al. 2024, NCA with preferences in place of rewards and K = 2 (arXiv:2402.05369).
Deviation: none.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.01}
RANGES = {"beta": (1e-6, math.inf)}


def nca_loss(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """Unreduced loss, [B] nats.

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      beta: inverse temperature of the implicit reward, > 0.

    See: Chen et al. 2024.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    noise = jax.nn.log_sigmoid(-beta * chosen) + jax.nn.log_sigmoid(-beta * rejected)
    return -jax.nn.log_sigmoid(beta * chosen) - 0.5 * noise


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, keys, "nca")
    losses = nca_loss(ratios[:, 0], ratios[:, 1], beta=beta)
    return {"nca": Mean.of(losses, batch.real)}, pair_metrics(logps, beta * ratios, batch)
