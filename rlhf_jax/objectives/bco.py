"""BCO: a binary classifier of good and bad responses whose logit is the implicit reward, shifted by its running mean.

    L = E over the desirable of −log σ( r − δ )  +  E over the undesirable of −log σ( −(r − δ) )
    r = β [log π(y|x) − log π_ref(y|x)],   δ = mean of r over all responses so far, this batch's included

Use: thumbs up and down, as for KTO, with a loss that does not saturate on responses that are far on the wrong side.
See: Jung et al. 2024 (arXiv:2404.04656), binary cross-entropy with reward shift.
Deviation: δ is the mean over all responses, as in TRL; the midpoint of both classes' means, which the paper derives, is the same where the
classes are of one size. Both parts are means over their class; TRL takes one mean over all rows, half of it for classes of one size. A
validation batch shifts δ for itself only. Weights by the density ratio of the classes' prompts (the paper's first version) are left out.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives._unpaired import baseline_of, feedback_metrics, response_sums, without_mismatched
from rlhf_jax.ops import running
from rlhf_jax.types import Array, Mean, PyTree, Unpaired

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.01}
RANGES = {"beta": (1e-6, math.inf)}


def bco_loss(log_ratios: Array, desirable: Array, shift: Array, *, beta: float) -> Array:
    """Unreduced −log σ( ±(r − δ) ), [B] nats.

    Args:
      log_ratios: log π(y|x) − log π_ref(y|x), [B] nats.
      desirable: [B] bool.
      shift: δ, [B] reward, held fixed.
      beta: inverse temperature of the implicit reward r = β · log-ratio, > 0.

    See: Jung et al. 2024.
    """
    chex.assert_rank([log_ratios, desirable, shift], 1)
    chex.assert_equal_shape([log_ratios, desirable, shift])
    above = beta * log_ratios - jax.lax.stop_gradient(shift)
    return -jax.nn.log_sigmoid(jnp.where(desirable, above, -above))


def init_carry(nets: Any) -> PyTree:
    return {"rewards": running.RunningMoments.empty()}


def prepare(nets: Any, batch: Unpaired, carry: PyTree, key: Array, *, beta: float) -> tuple[Unpaired, PyTree, dict[str, Mean]]:
    _, log_ratios = response_sums(nets.policy(batch.seqs).logps, batch.seqs, "bco")
    rewards = running.update(carry["rewards"], beta * log_ratios, batch.real)
    shift = jnp.broadcast_to(rewards.mean, log_ratios.shape)
    return without_mismatched(batch, baseline=shift), {"rewards": rewards}, {"reward/std": Mean.of(rewards.std)}


def loss(nets: Any, batch: Unpaired, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, log_ratios = response_sums(nets.policy(batch.seqs, keys).logps, batch.seqs, "bco")
    shift = baseline_of(batch, "bco")
    losses = bco_loss(log_ratios, batch.desirable, shift, beta=beta)
    terms = {
        "desirable": Mean.of(losses, batch.real & batch.desirable),
        "undesirable": Mean.of(losses, batch.real & ~batch.desirable),
    }
    metrics = feedback_metrics(beta * log_ratios, shift, logps, batch)
    return terms, metrics | {"reward/baseline": Mean.of(shift, batch.real)}
