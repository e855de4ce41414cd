"""What the objectives on preference pairs share: log-probs of the two responses, and the metrics that users watch.

Responses are scored by the sum of their log-probs over the loss tokens (DPO's choice; SimPO and ORPO take the mean themselves).
"""

from __future__ import annotations

import chex

from rlhf_jax.ops.masking import loss_tokens, masked_sum
from rlhf_jax.types import Array, Comparisons, Mean, Sequences


def response_logps(logps: Array, seqs: Sequences) -> tuple[Array, Array]:
    """log π(y_w|x) and log π(y_l|x): sums over each branch's loss tokens, [B] nats each.

    Args:
      logps: [B, 2, T] nats, the better response first.
      seqs: the pairs, tokens [B, 2, T].
    """
    chex.assert_shape([logps, seqs.tokens], (None, 2, None))
    chex.assert_equal_shape([logps, seqs.tokens])
    sums = masked_sum(logps, loss_tokens(seqs))
    return sums[:, 0], sums[:, 1]


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
        "reward/accuracy": Mean.of((margin > 0) + 0.5 * (margin == 0), batch.real),
    }
