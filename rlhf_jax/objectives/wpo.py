"""WPO: DPO whose pairs weigh as much as the policy would write both responses itself, which brings off-policy data nearer to on-policy.

    L = −w(x, y_w) w(x, y_l) log σ(h),   h = β [ log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) ]
    w(x, y) = exp( 1/|y| Σ_t [ log π(y_t) − log Σ_v π(v)² ] ),   held fixed

Use: preference pairs that another model wrote.
See: Zhou et al. 2024, eq. 2, with the sampled alignment (arXiv:2406.11827).
Deviation: none with weight_max = inf, as in TRL; the authors' code keeps the product of both weights at 1 at most.
The weighted loss also falls when the weights do, so that reward/accuracy, not the loss, selects checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives._pairs import pair_metrics
from rlhf_jax.objectives._reference import reference_logps
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.ops import vocab
from rlhf_jax.ops.kl import exp_ratio
from rlhf_jax.ops.masking import loss_tokens, masked_mean, masked_sum
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.01, "weight_max": math.inf}
RANGES = {"beta": (1e-6, math.inf), "weight_max": (0.0, math.inf)}


def wpo_weights(logps: Array, log_sum_sq_probs: Array, mask: Array, *, weight_max: float) -> Array:
    """w(x, y_w) w(x, y_l), [B] > 0, without a gradient.

    Over the policy's own samples a token's factor is 1 on average, and so the geometric mean of a response of given length at most 1.

    Args:
      logps: log π(y_t), [B, 2, T] nats.
      log_sum_sq_probs: log Σ_v π(v)² of each token's distribution, [B, 2, T] nats.
      mask: the tokens of the responses, [B, 2, T] bool.
      weight_max: bound of a pair's weight; inf = none.

    See: Zhou et al. 2024, eq. 2.
    """
    chex.assert_shape([logps, log_sum_sq_probs, mask], (None, 2, None))
    chex.assert_equal_shape([logps, log_sum_sq_probs, mask])
    weights = exp_ratio(masked_mean(logps - log_sum_sq_probs, mask).sum(-1))
    return jax.lax.stop_gradient(jnp.minimum(weights, weight_max))


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, weight_max: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    chex.assert_shape(batch.seqs.tokens, (None, 2, None))
    ref_logps, mask = reference_logps(batch.seqs, "wpo"), loss_tokens(batch.seqs)
    out = nets.policy(batch.seqs, keys, want=(vocab.logps, vocab.log_sum_sq_probs))
    ratios = masked_sum(out.logps - ref_logps, mask)
    weights = wpo_weights(out.logps, out.log_sum_sq_probs, mask, weight_max=weight_max)
    losses = weights * dpo_loss(ratios[:, 0], ratios[:, 1], beta=beta)
    metrics = pair_metrics(masked_sum(out.logps, mask), beta * ratios, batch) | {"policy/pair_weight": Mean.of(weights, batch.real)}
    return {"wpo": Mean.of(losses, batch.real)}, metrics
