"""cDPO: DPO that takes a fraction of the labels to be flipped, so that the margin stops growing where it says so.

    L = −(1 − ε) log σ( h ) − ε log σ( −h ),   h = β [ log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) ]

Use: noisy labels, or a DPO run whose margins grow without bound: the loss is least at σ(h) = 1 − ε.
See: Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".
Deviation: none; ε = 0 is DPO. TRL's "sigmoid" loss takes no notice of its label_smoothing, so this is an objective of its own.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.1, "epsilon": 0.1}
RANGES = {"beta": (1e-6, math.inf), "epsilon": (0.0, 0.499)}


def cdpo_loss(chosen: Array, rejected: Array, *, beta: float, epsilon: float) -> Array:
    """Unreduced loss, [B] nats.

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      beta: inverse temperature of the implicit reward, > 0.
      epsilon: ε, how likely a label is flipped, [0, 0.5).

    See: Mitchell 2023.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    margin = beta * (chosen - rejected)
    return -(1.0 - epsilon) * jax.nn.log_sigmoid(margin) - epsilon * jax.nn.log_sigmoid(-margin)


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, epsilon: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, keys, "cdpo")
    losses = cdpo_loss(ratios[:, 0], ratios[:, 1], beta=beta, epsilon=epsilon)
    return {"cdpo": Mean.of(losses, batch.real)}, pair_metrics(logps, beta * ratios, batch)
