"""DiscoPOP: a loss that a language model discovered: logistic where the policy prefers the wrong response, exponential where the right one.

    L = (1 − σ(h/τ)) · −log σ(h)  +  σ(h/τ) · e⁻ʰ,   h = β [ log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) ]

Use: in DPO's place. It is not convex: with τ = 0.05 a pair that starts at h = 0 first falls towards a minimum at h = −2.4τ, and only the
noise of batches carries it over the top at 1.4τ; above τ = 0.2 there is no such minimum.
See: Lu et al. 2024, eq. 5 (arXiv:2406.08414).
Deviation: none; exponentials saturate at e⁶⁰.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.ops.kl import exp_ratio
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.05, "tau": 0.05}
RANGES = {"beta": (1e-6, math.inf), "tau": (1e-6, math.inf)}


def discopop_loss(chosen: Array, rejected: Array, *, beta: float, tau: float) -> Array:
    """Unreduced loss, [B].

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      beta: inverse temperature of the implicit reward, > 0.
      tau: τ, width of the passage from one loss to the other in units of h, > 0.

    See: Lu et al. 2024, eq. 5.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    margin = beta * (chosen - rejected)
    logistic = jax.nn.sigmoid(-margin / tau) * jax.nn.log_sigmoid(margin)
    return exp_ratio(jax.nn.log_sigmoid(margin / tau) - margin) - logistic  # one exponential: 0 · ∞ is NaN


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, tau: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, keys, "discopop")
    losses = discopop_loss(ratios[:, 0], ratios[:, 1], beta=beta, tau=tau)
    return {"discopop": Mean.of(losses, batch.real)}, pair_metrics(logps, beta * ratios, batch)
