"""KTO: prospect theory on single responses: a desirable one should gain over the reference point, an undesirable one fall below it.

    L = λ_D [1 − σ( β (r − z) )] if y is desirable,   λ_U [1 − σ( β (z − r) )] if not;   r = log π(y|x) − log π_ref(y|x)
    z = max( 0, mean over the batch of log π(y'|x) − log π_ref(y'|x) ),   y' another row's response

Use: feedback is a thumb up or down on single responses, without pairs; the two classes may be of different size.
See: Ethayarajh et al. 2024, section 4.1 (arXiv:2402.01306).
Deviation: none; the mean of z is over the global batch, a row's y' is the next row's response (its own in a batch of one), and z is held
fixed. TRL takes the row before, within a device's batch; its loss is the same mean over all rows.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives._unpaired import baseline_of, feedback_metrics, response_sums, without_mismatched
from rlhf_jax.ops.masking import masked_mean
from rlhf_jax.types import Array, Mean, PyTree, Unpaired

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
RANGES = {"beta": (1e-6, math.inf), "desirable_weight": (0.0, math.inf), "undesirable_weight": (0.0, math.inf)}


def kto_loss(
    log_ratios: Array, desirable: Array, baseline: Array, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Array:
    """Unreduced loss, [B], between 0 and the row's weight.

    Args:
      log_ratios: r = log π(y|x) − log π_ref(y|x), [B] nats.
      desirable: [B] bool.
      baseline: z, [B] nats, held fixed.
      beta: inverse temperature of the implicit reward, > 0; the larger, the sooner a response counts as won or lost.
      desirable_weight: λ_D, weight of desirable responses, ≥ 0; of n_D and n_U rows, λ_D n_D / (λ_U n_U) between 1 and 4/3 is advised.
      undesirable_weight: λ_U, weight of undesirable responses, ≥ 0.

    See: Ethayarajh et al. 2024, section 4.1.
    """
    chex.assert_rank([log_ratios, desirable, baseline], 1)
    chex.assert_equal_shape([log_ratios, desirable, baseline])
    gain = beta * (log_ratios - jax.lax.stop_gradient(baseline))
    return jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain))


def reference_point(log_ratios: Array, mask: Array) -> Array:
    """z = max(0, mean of the log-ratios), [] nats; 0 without any.

    Args:
      log_ratios: log π(y'|x) − log π_ref(y'|x) of the mismatched pairs, [B] nats.
      mask: [B] bool, the pairs that count.
    """
    chex.assert_rank([log_ratios, mask], 1)
    return jnp.maximum(masked_mean(log_ratios, mask), 0.0)


def prepare(nets: Any, batch: Unpaired, carry: PyTree, key: Array) -> tuple[Unpaired, PyTree, dict[str, Mean]]:
    chex.assert_rank(batch.desirable, 1)
    if batch.kl_seqs is None:
        raise AssertionError("kto: this batch has no kl_seqs, on which its reference point is estimated")
    _, log_ratios = response_sums(nets.policy(batch.kl_seqs).logps, batch.kl_seqs, "kto")
    mask = batch.real & batch.kl_seqs.real
    baseline = jnp.broadcast_to(reference_point(log_ratios, mask), mask.shape)
    return without_mismatched(batch, baseline=baseline), carry, {"objective/kl": Mean.of(log_ratios, mask)}


def loss(
    nets: Any, batch: Unpaired, keys: Array | None, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, log_ratios = response_sums(nets.policy(batch.seqs, keys).logps, batch.seqs, "kto")
    baseline = baseline_of(batch, "kto")
    losses = kto_loss(
        log_ratios, batch.desirable, baseline, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    metrics = feedback_metrics(beta * log_ratios, beta * baseline, logps, batch)
    return {"kto": Mean.of(losses, batch.real)}, metrics | {"reward/baseline": Mean.of(beta * baseline, batch.real)}
