"""IPO: the margin of the log-ratios is pulled to a fixed target, so that near-certain preferences do not push it to infinity.

    L = ( h − 1/(2τ) )²,   h = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)

Use: few or deterministic preferences, on which DPO overfits: τ holds the policy near the reference whatever the data say.
See: Azar et al. 2023, eq. 17 (arXiv:2310.12036).
Deviation: none with reduction = "sum". TRL divides the log-ratios by the response's length, which is reduction = "mean" here: the target
margin is then one per token. Its authors report that the paper's own experiments used that form.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives._pairs import REDUCTIONS, pair_metrics, token_reading
from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"tau": 0.1, "reduction": "sum"}
RANGES = {"tau": (1e-4, math.inf), "reduction": REDUCTIONS}


def ipo_loss(chosen: Array, rejected: Array, *, tau: float) -> Array:
    """Unreduced loss, [B] nats².

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      tau: τ, weight of the KL from the reference; the margin's target is 1/(2τ) nats, > 0.

    See: Azar et al. 2023, eq. 17.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    return jnp.square(chosen - rejected - 1.0 / (2.0 * tau))


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, tau: float, reduction: str) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """The loss on log-ratios reduced over each response.

    Args:
      reduction: of the log-ratios over a response's tokens: "sum", or "mean".
    """
    logps, ratios, mask = token_reading(nets, batch, keys, "ipo")
    ratios = REDUCTIONS[reduction](ratios, mask)
    losses = ipo_loss(ratios[:, 0], ratios[:, 1], tau=tau)
    return {"ipo": Mean.of(losses, batch.real)}, pair_metrics(masked_sum(logps, mask), tau * ratios, batch)
