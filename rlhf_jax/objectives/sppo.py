"""SPPO: self-play towards a Nash equilibrium: each log-ratio is pulled to how much its response wins, with certain verdicts.

    L = ( log π(y_w|x)/π_ref(y_w|x) − η/2 )² + ( log π(y_l|x)/π_ref(y_l|x) + η/2 )²

Use: rounds of self-play: pairs sampled from the last round's policy, which is also the reference.
See: Wu et al. 2024, eq. 4.7 (arXiv:2405.00675), with P(y_w ≻ y_l) = 1.
Deviation: the verdict is certain ("sppo_hard" in TRL), where the paper takes win rates estimated from several samples; TRL's β is 1/η.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"eta": 1000.0}
RANGES = {"eta": (1e-6, math.inf)}


def sppo_loss(chosen: Array, rejected: Array, *, eta: float) -> Array:
    """Unreduced loss, [B] nats².

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      eta: η, how far the log-ratios of a sure winner and a sure loser shall lie apart, > 0 nats.

    See: Wu et al. 2024, eq. 4.7.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    return jnp.square(chosen - 0.5 * eta) + jnp.square(rejected + 0.5 * eta)


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, eta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, keys, "sppo")
    losses = sppo_loss(ratios[:, 0], ratios[:, 1], eta=eta)
    return {"sppo": Mean.of(losses, batch.real)}, pair_metrics(logps, ratios / eta, batch)
