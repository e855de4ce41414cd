"""Plackett–Luce reward model: the likelihood of a whole ranking, a softmax choice of the best among those that are left, again and again.

    L = −Σ_k log( exp r_k / Σ_{j ≥ k} exp r_j ),   r_1 … r_K the rewards of the responses, best first

Use: annotators, or a judge, rank several responses to a prompt; one term per ranking instead of all its pairs.
See: Zhu et al. 2023 (arXiv:2301.11270), the K-wise maximum likelihood estimator; Luce 1959; Plackett 1975.
Deviation: none; K = 2 is Bradley–Terry. Ouyang et al. 2022 split a ranking into its pairs instead. A ranking with fewer responses has fewer
factors; a ranking's loss is not divided by its length.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.ops.masking import at_last_real, masked_sum
from rlhf_jax.types import Array, Comparisons, Mean

DATA = ("ranking", "preference")
DEFAULTS: dict[str, Any] = {}


def plackett_luce_loss(rewards: Array, present: Array) -> Array:
    """Unreduced negative log-likelihood of each ranking, [B] nats.

    Args:
      rewards: r, best response first, [B, K]; may hold anything where a response is absent.
      present: [B, K] bool.

    See: Zhu et al. 2023, MLE_K.
    """
    chex.assert_rank([rewards, present], 2)
    chex.assert_equal_shape([rewards, present])
    rewards = jnp.where(present, rewards, 0.0).astype(jnp.float32)
    places = jnp.arange(rewards.shape[1])
    left = (places[None, :] > places[:, None])[None] & present[:, None, :] | (places[None, :] == places[:, None])[None]  # [B, K, K]
    choices = jax.nn.logsumexp(jnp.broadcast_to(rewards[:, None, :], left.shape), axis=-1, where=left)
    return masked_sum(choices - rewards, present)


def ranking_metrics(rewards: Array, present: Array) -> dict[str, Mean]:
    """Rewards of the best response and of the others; margin and accuracy over all pairs of a ranking; of two responses, those of a pair.

    Args:
      rewards: best response first, [B, K].
      present: [B, K] bool.
    """
    chex.assert_rank([rewards, present], 2)
    chex.assert_equal_shape([rewards, present])
    places = jnp.arange(rewards.shape[1])
    pairs = present[:, :, None] & present[:, None, :] & (places[:, None] < places[None, :])[None]  # [B, better, worse]
    margin = rewards[:, :, None] - rewards[:, None, :]
    return {
        "reward/chosen": Mean.of(rewards[:, 0], present[:, 0]),
        "reward/rejected": Mean.of(rewards[:, 1:], present[:, 1:]),
        "reward/margin": Mean.of(margin, pairs),
        "reward/accuracy": Mean.of((margin > 0) + 0.5 * (margin == 0), pairs),
    }


def loss(nets: Any, batch: Comparisons, keys: Array | None) -> tuple[dict[str, Mean], dict[str, Mean]]:
    rewards = at_last_real(nets.reward(batch.seqs, keys).scores, batch.seqs.segment_ids)  # [B, K]
    present = batch.seqs.real & batch.real[:, None]
    return {"plackett_luce": Mean.of(plackett_luce_loss(rewards, present), batch.real)}, ranking_metrics(rewards, present)
