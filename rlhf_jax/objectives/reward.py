"""Reward model: Bradley–Terry on preference pairs, with the annotators' margin and an optional centring term.

    L = −log σ( r(x, y_w) − r(x, y_l) − m )  +  center_coef · ( r(x, y_w) + r(x, y_l) )²

Use: learn a scalar reward from preference pairs, for PPO, GRPO and best-of-n.
See: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1, with K = 2; margin m: Touvron et al. 2023, Llama 2 (arXiv:2307.09288), eq. 2;
centring: Eisenstein et al. 2023, "Helping or Herding?" (arXiv:2312.09244).
Deviation: none; a batch without margins has m = 0.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives._pairs import reward_metrics
from rlhf_jax.ops.masking import at_last_real
from rlhf_jax.types import Array, Comparisons, Mean

DEFAULTS = {"center_coef": 0.0}
RANGES = {"center_coef": (0.0, math.inf)}


def bradley_terry_loss(chosen: Array, rejected: Array, margin: Array) -> Array:
    """Unreduced −log σ(r_w − r_l − m), [B] nats.

    Args:
      chosen: r(x, y_w), [B].
      rejected: r(x, y_l), [B].
      margin: m, [B], ≥ 0.

    See: Touvron et al. 2023, eq. 2.
    """
    chex.assert_rank([chosen, rejected, margin], 1)
    chex.assert_equal_shape([chosen, rejected, margin])
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def centring_loss(chosen: Array, rejected: Array, *, center_coef: float) -> Array:
    """Unreduced center_coef · (r_w + r_l)²: a pair fixes only the difference, this fixes the level, [B].

    Args:
      chosen: r(x, y_w), [B].
      rejected: r(x, y_l), [B].
      center_coef: weight of (r_w + r_l)², ≥ 0; the paper's 0.01 is usual, 0 = off.

    See: Eisenstein et al. 2023 (arXiv:2312.09244).
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    return center_coef * jnp.square(chosen + rejected)


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, center_coef: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    chex.assert_shape(batch.seqs.tokens, (None, 2, None))
    rewards = at_last_real(nets.reward(batch.seqs, keys).scores, batch.seqs.segment_ids)  # [B, 2]
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    margin = jnp.zeros_like(chosen) if batch.margin is None else batch.margin
    terms = {"bradley_terry": Mean.of(bradley_terry_loss(chosen, rejected, margin), batch.real)}
    if center_coef:
        terms["centring"] = Mean.of(centring_loss(chosen, rejected, center_coef=center_coef), batch.real)
    return terms, reward_metrics(chosen, rejected, batch)
