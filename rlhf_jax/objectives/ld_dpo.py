"""LD-DPO: length-desensitised DPO: tokens beyond the length that both responses reach count less.

    L = DPO's, with   log π(y|x) = Σ_{t ≤ l} log π(y_t)  +  α Σ_{t > l} log π(y_t),   l = min(|y_w|, |y_l|)

Use: DPO that makes responses longer; α = 1 is DPO, α = 0 cuts the longer response off.
See: Liu et al. 2024 (arXiv:2409.06411).
Deviation: none; the reference's log-probs are weighted alike.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives._pairs import pair_metrics, token_reading
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.1, "alpha": 0.5}
RANGES = {"beta": (1e-6, math.inf), "alpha": (0.0, 1.0)}


def length_weights(mask: Array, *, alpha: float) -> Array:
    """1 on the first min(|y_w|, |y_l|) tokens of each response, α beyond, [B, 2, T].

    Args:
      mask: the tokens of the responses, [B, 2, T] bool.
      alpha: weight of the tokens that the shorter response has no counterpart to, [0, 1].

    See: Liu et al. 2024.
    """
    chex.assert_shape(mask, (None, 2, None))
    shared = mask.sum(-1).min(-1)[:, None, None]
    return jnp.where(jnp.cumsum(mask, -1) <= shared, 1.0, alpha)


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, alpha: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios, mask = token_reading(nets, batch, keys, "ld_dpo")
    ratios = masked_sum(length_weights(mask, alpha=alpha) * ratios, mask)
    losses = dpo_loss(ratios[:, 0], ratios[:, 1], beta=beta)
    return {"ld_dpo": Mean.of(losses, batch.real)}, pair_metrics(masked_sum(logps, mask), beta * ratios, batch)
