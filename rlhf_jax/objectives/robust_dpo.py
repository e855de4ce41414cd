"""ROBUST DPO: an estimate of DPO's loss on clean labels from noisy ones, unbiased if the rate of flips is right.

    L = [ (1 − ε) ℓ(h) − ε ℓ(−h) ] / (1 − 2ε),   ℓ(h) = −log σ(h)
    h = β [ log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) ]

Use: labels that are flipped at a known rate; its margins keep growing, where cDPO's stop.
See: Chowdhury et al. 2024 (arXiv:2403.00409).
Deviation: none; the loss has no lower bound, as in the paper. ε = 0 is DPO.
"""

from __future__ import annotations

import math
from typing import Any

import chex

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.01, "epsilon": 0.1}
RANGES = {"beta": (1e-6, math.inf), "epsilon": (0.0, 0.49)}


def robust_dpo_loss(chosen: Array, rejected: Array, *, beta: float, epsilon: float) -> Array:
    """Unreduced loss, [B] nats, of either sign.

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      beta: inverse temperature of the implicit reward, > 0.
      epsilon: ε, how likely a label is flipped, [0, 0.5).

    See: Chowdhury et al. 2024.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    as_labelled, flipped = dpo_loss(chosen, rejected, beta=beta), dpo_loss(rejected, chosen, beta=beta)
    return ((1.0 - epsilon) * as_labelled - epsilon * flipped) / (1.0 - 2.0 * epsilon)


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, epsilon: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, keys, "robust_dpo")
    losses = robust_dpo_loss(ratios[:, 0], ratios[:, 1], beta=beta, epsilon=epsilon)
    return {"robust_dpo": Mean.of(losses, batch.real)}, pair_metrics(logps, beta * ratios, batch)
