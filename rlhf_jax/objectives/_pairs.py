"""What the objectives on preference pairs share: log-probs of the two responses, and the metrics that users watch.

Arrays are [B, 2] or [B, 2, T], the better response first. A response's log-prob is the sum over its tokens (DPO's choice) unless an objective
reduces the tokens otherwise; a response without any has 0.
"""

from __future__ import annotations

from typing import Any

import chex

from rlhf_jax.objectives._reference import reference_logps
from rlhf_jax.ops.masking import loss_tokens, masked_mean, masked_sum
from rlhf_jax.types import Array, Comparisons, Mean

REDUCTIONS = {"sum": masked_sum, "mean": masked_mean}  # of a response's tokens, by the name that a config gives


class ShiftedComparisons(Comparisons, kw_only=True):
    """Pairs, and the reward that each response is compared with."""

    shift: Array  # [B] float32


def policy_reading(nets: Any, batch: Comparisons, keys: Array | None) -> tuple[Array, Array]:
    """log π of each token of both responses, [B, 2, T] nats, and which tokens count, [B, 2, T] bool.

    Args:
      nets: the networks.
      batch: the pairs.
      keys: [B] typed keys for dropout, or None.
    """
    chex.assert_shape(batch.seqs.tokens, (None, 2, None))
    return nets.policy(batch.seqs, keys).logps, loss_tokens(batch.seqs)


def token_reading(nets: Any, batch: Comparisons, keys: Array | None, objective: str) -> tuple[Array, Array, Array]:
    """log π and log π − log π_ref of each token, [B, 2, T] nats each, and which tokens count, [B, 2, T] bool.

    Args:
      nets: the networks.
      batch: the pairs.
      keys: [B] typed keys for dropout, or None.
      objective: who asks, for the error.

    Raises:
      UserError: the run has no reference.
    """
    chex.assert_shape(batch.seqs.tokens, (None, 2, None))
    ref_logps = reference_logps(batch.seqs, objective)
    logps, mask = policy_reading(nets, batch, keys)
    return logps, logps - ref_logps, mask


def pair_reading(nets: Any, batch: Comparisons, keys: Array | None, objective: str) -> tuple[Array, Array]:
    """log π(y|x) and log π(y|x) − log π_ref(y|x), [B, 2] nats each.

    Args:
      nets: the networks.
      batch: the pairs.
      keys: [B] typed keys for dropout, or None.
      objective: who asks, for the error.

    Raises:
      UserError: the run has no reference.
    """
    chex.assert_shape(batch.seqs.tokens, (None, 2, None))
    logps, ratios, mask = token_reading(nets, batch, keys, objective)
    return masked_sum(logps, mask), masked_sum(ratios, mask)


def pair_metrics(logps: Array, rewards: Array, batch: Comparisons) -> dict[str, Mean]:
    """reward/* and logps/* of the pairs; logps/accuracy needs no reference, and a tie counts one half.

    Args:
      logps: log π(y|x), [B, 2] nats.
      rewards: [B, 2], implicit ones.
      batch: the pairs.
    """
    chex.assert_rank([logps, rewards], 2)
    chex.assert_equal_shape([logps, rewards])
    return reward_metrics(rewards[:, 0], rewards[:, 1], batch) | {
        "logps/chosen": Mean.of(logps[:, 0], batch.real),
        "logps/rejected": Mean.of(logps[:, 1], batch.real),
        "logps/accuracy": Mean.of(_ranked(logps[:, 0] - logps[:, 1]), batch.real),
    }


def reward_metrics(chosen: Array, rejected: Array, batch: Comparisons) -> dict[str, Mean]:
    """reward/chosen, reward/rejected, reward/margin and reward/accuracy; a tie counts one half.

    Args:
      chosen: [B] reward of the better response, explicit or implicit.
      rejected: [B] reward of the other.
      batch: the pairs.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected, batch.real])
    margin = chosen - rejected
    return {
        "reward/chosen": Mean.of(chosen, batch.real),
        "reward/rejected": Mean.of(rejected, batch.real),
        "reward/margin": Mean.of(margin, batch.real),
        "reward/accuracy": Mean.of(_ranked(margin), batch.real),
    }


def _ranked(margin: Array) -> Array:
    """1 where the better response is ahead, one half at a tie, else 0."""
    return (margin > 0) + 0.5 * (margin == 0)
