"""SimPO: reference-free preference optimisation on length-normalised log-probs, with a target margin.

    L = −log σ( β/|y_w| · log π(y_w|x)  −  β/|y_l| · log π(y_l|x)  −  γ )

Use: preference pairs without a reference in memory, and responses that should not grow longer; sensitive to the learning rate.
See: Meng et al. 2024, eq. 6 (arXiv:2405.14734).
Deviation: none; γ is the margin itself, as in the paper's equation; the authors' code takes γ/β.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax

from rlhf_jax.objectives._pairs import pair_metrics, policy_reading
from rlhf_jax.ops.masking import masked_mean, masked_sum
from rlhf_jax.types import Array, Comparisons, Mean

DEFAULTS = {"beta": 2.5, "gamma": 1.375}
RANGES = {"beta": (1e-6, math.inf), "gamma": (0.0, math.inf)}


def simpo_loss(chosen: Array, rejected: Array, *, beta: float, gamma: float) -> Array:
    """Unreduced loss, [B] nats.

    Args:
      chosen: log π(y_w|x) / |y_w|, [B] nats per token.
      rejected: log π(y_l|x) / |y_l|, [B] nats per token.
      beta: inverse temperature of the implicit reward per token, > 0; 2 to 10 in the paper.
      gamma: γ, by how much the chosen response's reward shall be the higher one, ≥ 0; 0.1 to 0.8 times β in the authors' runs.

    See: Meng et al. 2024, eq. 6.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, gamma: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, mask = policy_reading(nets, batch, keys)
    means = masked_mean(logps, mask)
    losses = simpo_loss(means[:, 0], means[:, 1], beta=beta, gamma=gamma)
    return {"simpo": Mean.of(losses, batch.real)}, pair_metrics(masked_sum(logps, mask), beta * means, batch)
