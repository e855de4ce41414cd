"""BCO ON PAIRS: a binary classifier of chosen and rejected responses whose logit is the implicit reward, shifted by its running mean.

    L = −log σ( r_w − δ ) − log σ( −(r_l − δ) ),   r = β log π(y|x)/π_ref(y|x)
    δ = mean of r over all responses so far, this batch's included, held fixed

Use: preference pairs of which a response is good or bad by itself, not only beside the other.
See: Jung et al. 2024 (arXiv:2404.04656), binary cross-entropy with reward shift.
Deviation: none but for δ, the mean of all rewards since the start, this batch's included, as in TRL's BCO, where MPO's paper calls it a moving
average of previous rewards; with pairs it is the midpoint of both classes' means. TRL's DPO trainer has δ = 0. A validation batch shifts δ for
itself only.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives._pairs import ShiftedComparisons, pair_metrics, pair_reading
from rlhf_jax.ops import running
from rlhf_jax.types import Array, Comparisons, Mean, PyTree

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.01}
RANGES = {"beta": (1e-6, math.inf)}


def bco_pair_loss(chosen: Array, rejected: Array, shift: Array, *, beta: float) -> Array:
    """Unreduced loss, [B] nats.

    Args:
      chosen: log π(y_w|x) − log π_ref(y_w|x), [B] nats.
      rejected: log π(y_l|x) − log π_ref(y_l|x), [B] nats.
      shift: δ, [B], held fixed.
      beta: inverse temperature of the implicit reward, > 0.

    See: Jung et al. 2024.
    """
    chex.assert_rank([chosen, rejected, shift], 1)
    chex.assert_equal_shape([chosen, rejected, shift])
    return -jax.nn.log_sigmoid(beta * chosen - shift) - jax.nn.log_sigmoid(shift - beta * rejected)


def with_shift(
    nets: Any, batch: Comparisons, rewards: running.RunningMoments, objective: str, *, beta: float
) -> tuple[ShiftedComparisons, running.RunningMoments]:
    """The pairs with δ, and the moments of all rewards so far, this batch's included.

    Args:
      nets: the networks.
      batch: the pairs.
      rewards: moments before this batch.
      objective: who asks, for the error.
      beta: inverse temperature of the implicit reward, > 0.
    """
    chex.assert_shape(batch.seqs.tokens, (None, 2, None))
    _, ratios = pair_reading(nets, batch, None, objective)
    rewards = running.update(rewards, beta * ratios, jnp.broadcast_to(batch.real[:, None], ratios.shape))
    shift = jnp.broadcast_to(rewards.mean, batch.real.shape)
    return ShiftedComparisons(seqs=batch.seqs, margin=batch.margin, shift=shift), rewards


def init_carry(nets: Any) -> PyTree:
    return {"rewards": running.RunningMoments.empty()}


def prepare(nets: Any, batch: Comparisons, carry: PyTree, key: Array, *, beta: float) -> tuple[ShiftedComparisons, PyTree, dict[str, Mean]]:
    shifted, rewards = with_shift(nets, batch, carry["rewards"], "bco_pair", beta=beta)
    return shifted, {"rewards": rewards}, {"reward/std": Mean.of(rewards.std)}


def loss(nets: Any, batch: ShiftedComparisons, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, keys, "bco_pair")
    losses = bco_pair_loss(ratios[:, 0], ratios[:, 1], batch.shift, beta=beta)
    metrics = pair_metrics(logps, beta * ratios, batch) | {"reward/baseline": Mean.of(batch.shift, batch.real)}
    return {"bco_pair": Mean.of(losses, batch.real)}, metrics
