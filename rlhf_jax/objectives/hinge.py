"""HINGE: sequence likelihood calibration: a pair stops to count once its margin is wide enough.

    L = max( 0, 1 − h ),   h = β [ log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) ]

Use: DPO's data, with no gradient from pairs that are already told apart.
See: Liu et al. 2023, RSO, "hinge-norm" (arXiv:2309.06657), on the margin of Zhao et al. 2023, SLiC-HF (arXiv:2305.10425).
Deviation: none from RSO; its rejection sampling is about data. SLiC-HF compares log-probs without a reference and adds a likelihood term.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.05}
RANGES = {"beta": (1e-6, math.inf)}


def hinge_loss(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """Unreduced loss, [B] ≥ 0.

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      beta: one over the margin from which on a pair does not count, > 0; γ in the paper.

    See: Liu et al. 2023.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    return jnp.maximum(1.0 - beta * (chosen - rejected), 0.0)


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, keys, "hinge")
    losses = hinge_loss(ratios[:, 0], ratios[:, 1], beta=beta)
    return {"hinge": Mean.of(losses, batch.real)}, pair_metrics(logps, beta * ratios, batch)
