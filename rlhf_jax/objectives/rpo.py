"""RPO: iterative reasoning preference optimisation: DPO and the likelihood of the chosen response.

    L = −log σ(h) − α log π(y_w|x) / |y_w|,   h = β [ log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) ]

Use: reasoning, where the chosen response must become likelier and not only likelier than the other; rounds of sampling and training.
See: Pang et al. 2024, eq. 1 (arXiv:2404.19733).
Deviation: none in the loss; a round samples its pairs from the last round's policy, which is another run here. TRL's "sft" term is the mean
over all chosen tokens of the batch, not over each response first.
"""

from __future__ import annotations

import math
from typing import Any

import chex

from rlhf_jax.objectives._pairs import pair_metrics, token_reading
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.ops.masking import masked_mean, masked_sum
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.1, "alpha": 1.0}
RANGES = {"beta": (1e-6, math.inf), "alpha": (0.0, math.inf)}


def mean_nll(logps: Array, mask: Array) -> Array:
    """−log π(y|x) / |y|, [B] nats per token; 0 for a response without tokens.

    Args:
      logps: [B, T] nats.
      mask: [B, T] bool.
    """
    chex.assert_rank([logps, mask], 2)
    return -masked_mean(logps, mask)


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, alpha: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """DPO's loss and a likelihood term.

    Args:
      alpha: weight of the chosen response's negative log-prob per token, ≥ 0.
    """
    logps, ratios, mask = token_reading(nets, batch, keys, "rpo")
    ratios = masked_sum(ratios, mask)
    terms = {
        "dpo": Mean.of(dpo_loss(ratios[:, 0], ratios[:, 1], beta=beta), batch.real),
        "nll": Mean.of(alpha * mean_nll(logps[:, 0], mask[:, 0]), batch.real),
    }
    return terms, pair_metrics(masked_sum(logps, mask), beta * ratios, batch)
