"""What the objectives on single responses share: implicit rewards, and metrics that merge exactly although the classes are of any size.

A response is on the right side of the baseline when it is desirable and its reward lies above, or undesirable and below.
"""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives._reference import reference_logps
from rlhf_jax.ops.masking import loss_tokens, masked_sum
from rlhf_jax.types import Array, Mean, Sequences, Unpaired


def response_sums(logps: Array, seqs: Sequences, objective: str) -> tuple[Array, Array]:
    """log π(y|x), and log π(y|x) − log π_ref(y|x), each a sum over the response's tokens, [B] nats.

    Args:
      logps: the policy's, [B, T] nats.
      seqs: [B, T], with the reference's log-probs.
      objective: who asks, for the error.

    Raises:
      UserError: the run has no reference.
    """
    chex.assert_rank([logps, seqs.tokens], 2)
    chex.assert_equal_shape([logps, seqs.tokens])
    mask = loss_tokens(seqs)
    return masked_sum(logps, mask), masked_sum(logps - reference_logps(seqs, objective), mask)


def feedback_metrics(rewards: Array, baseline: Array, logps: Array, batch: Unpaired) -> dict[str, Mean]:
    """reward/* and logps/* of the desirable (chosen) and the undesirable (rejected) responses, and how far they are on the right side.

    Args:
      rewards: β · log-ratio, [B].
      baseline: what they are compared with, [B].
      logps: log π(y|x), [B] nats.
      batch: the responses.
    """
    chex.assert_rank([rewards, baseline, logps], 1)
    chex.assert_equal_shape([rewards, baseline, logps, batch.desirable])
    good, bad = batch.real & batch.desirable, batch.real & ~batch.desirable
    margin = jnp.where(batch.desirable, rewards - baseline, baseline - rewards)
    return {
        "reward/chosen": Mean.of(rewards, good),
        "reward/rejected": Mean.of(rewards, bad),
        "reward/margin": Mean.of(margin, batch.real),
        "reward/accuracy": Mean.of((margin > 0) + 0.5 * (margin == 0), batch.real),
        "logps/chosen": Mean.of(logps, good),
        "logps/rejected": Mean.of(logps, bad),
    }


def baseline_of(batch: Unpaired, objective: str) -> Array:
    """`batch.baseline`, which `prepare` fills in, [B].

    Args:
      batch: the responses.
      objective: who asks, for the error.

    Raises:
      AssertionError: `prepare` was not called.
    """
    if batch.baseline is None:
        raise AssertionError(f"{objective}: this batch has no baseline: call the objective's prepare before its loss")
    chex.assert_equal_shape([batch.baseline, batch.desirable])
    return batch.baseline


def without_mismatched(batch: Unpaired, **leaves: Any) -> Unpaired:
    """`batch` with other leaves and without the mismatched pairs, so that no forward over them is kept.

    Args:
      batch: the responses.
      leaves: as for `replace`.
    """
    chex.assert_equal_shape([batch.desirable, batch.real])
    return batch.replace(kl_seqs=None, **leaves)
