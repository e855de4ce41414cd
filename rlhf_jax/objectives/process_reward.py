"""Process reward model: a verdict on every step of an answer, as binary cross-entropy at the end of each step.

    L = mean over the batch's labelled steps of −y log σ(s) − (1 − y) log σ(−s),   s the score at the end of a step, y = 1 if it is right

Use: long reasoning, where one knows which step goes wrong: to rank solutions step by step, or as a reward that is read at the last step.
See: Lightman et al. 2023, "Let's Verify Step by Step", section 2.6 (arXiv:2305.20050); Uesato et al. 2022 (arXiv:2211.14275).
Deviation: a scalar head gives the logit, where the papers train a language model to write the verdict as a token; no neutral label.
"""

from __future__ import annotations

from typing import Any

import chex
import jax

from rlhf_jax.objectives._rewards import label_weights
from rlhf_jax.types import Array, Labelled, Mean

DATA = ("stepwise",)
DEFAULTS: dict[str, Any] = {}


def verdict_loss(scores: Array, targets: Array) -> Array:
    """Unreduced binary cross-entropy of the logits, [B, T] nats.

    Args:
      scores: s, read after each token, [B, T] logits of "right".
      targets: y in [0, 1], [B, T]; a fraction is a soft label.

    See: Lightman et al. 2023, section 2.6.
    """
    chex.assert_equal_shape([scores, targets])
    return -targets * jax.nn.log_sigmoid(scores) - (1.0 - targets) * jax.nn.log_sigmoid(-scores)


def loss(nets: Any, batch: Labelled, keys: Array | None) -> tuple[dict[str, Mean], dict[str, Mean]]:
    scores, weights = nets.reward(batch.seqs, keys).scores, label_weights(batch)  # [B, T] each
    right = batch.targets > 0.5
    hit = ((scores > 0) == right) * (scores != 0) + 0.5 * (scores == 0)
    metrics = {
        "reward/step_accuracy": Mean.of(hit, weights),
        "reward/chosen": Mean.of(scores, weights * right),
        "reward/rejected": Mean.of(scores, weights * ~right),
    }
    return {"process_reward": Mean.of(verdict_loss(scores, batch.targets), weights)}, metrics
