"""APO-zero on single responses: the likelihood of desirable responses rises, that of undesirable ones falls, both from the reference's.

    L = 1 − σ( β r ) if y is desirable,   σ( β r ) if not;   r = log π(y|x) − log π_ref(y|x)

Use: thumbs up and down where the desirable responses are better than what the policy writes by itself; KTO without its reference point.
See: D'Oosterlinck et al. 2024, APO-zero (arXiv:2408.06266).
Deviation: the paper sums both parts over a pair; here each response counts by itself, and the mean is over responses, as in TRL. The 1
keeps the loss positive and has no gradient.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives._unpaired import feedback_metrics, response_sums, without_mismatched
from rlhf_jax.types import Array, Mean, PyTree, Unpaired

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.1}
RANGES = {"beta": (1e-6, math.inf)}


def apo_zero_unpaired_loss(log_ratios: Array, desirable: Array, *, beta: float) -> Array:
    """Unreduced loss, [B] in [0, 1].

    Args:
      log_ratios: r = log π(y|x) − log π_ref(y|x), [B] nats.
      desirable: [B] bool.
      beta: inverse temperature of the implicit reward, > 0.

    See: D'Oosterlinck et al. 2024, APO-zero.
    """
    chex.assert_rank([log_ratios, desirable], 1)
    chex.assert_equal_shape([log_ratios, desirable])
    return jax.nn.sigmoid(jnp.where(desirable, -beta, beta) * log_ratios)


def prepare(nets: Any, batch: Unpaired, carry: PyTree, key: Array) -> tuple[Unpaired, PyTree, dict[str, Mean]]:
    return without_mismatched(batch), carry, {}


def loss(nets: Any, batch: Unpaired, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, log_ratios = response_sums(nets.policy(batch.seqs, keys).logps, batch.seqs, "apo_zero_unpaired")
    losses = apo_zero_unpaired_loss(log_ratios, batch.desirable, beta=beta)
    return {"apo_zero_unpaired": Mean.of(losses, batch.real)}, feedback_metrics(beta * log_ratios, jnp.zeros_like(log_ratios), logps, batch)
