"""ORPO: fine-tuning on the chosen responses, with the odds ratio of the two responses as a penalty; SFT and alignment in one stage.

    L = mean over the chosen responses' tokens of −log π(y_t)  +  λ · mean over pairs of −log σ( log odds(y_w) − log odds(y_l) )
    odds(y) = p / (1 − p),   p = π(y|x)^(1/|y|)

Use: from a base model to an aligned one in a single run, without a reference.
See: Hong et al. 2024, eq. 4, 6 and 7 (arXiv:2403.07691).
Deviation: none; the first term is over the response. The authors' code and TRL take prompt and response; there λ is β. Where p is within
1e-6 of 1, its odds are held there.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax

from rlhf_jax.objectives._pairs import pair_metrics, policy_reading
from rlhf_jax.ops.masking import masked_mean, masked_sum
from rlhf_jax.ops.odds import log_odds
from rlhf_jax.types import Array, Comparisons, Mean

DEFAULTS = {"odds_coef": 0.1}
RANGES = {"odds_coef": (0.0, math.inf)}


def odds_ratio_loss(chosen: Array, rejected: Array) -> Array:
    """Unreduced −log σ( log odds(y_w) − log odds(y_l) ), [B] nats.

    Args:
      chosen: log π(y_w|x) / |y_w|, [B] nats per token.
      rejected: log π(y_l|x) / |y_l|, [B] nats per token.

    See: Hong et al. 2024, eq. 7.
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    return -jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, odds_coef: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """A token term and a pair term; the implicit reward is the log odds.

    Args:
      odds_coef: λ, weight of the odds ratio, ≥ 0.
    """
    logps, mask = policy_reading(nets, batch, keys)
    means = masked_mean(logps, mask)
    terms = {
        "nll": Mean.of(-logps[:, 0], mask[:, 0] & batch.real[:, None]),
        "odds_ratio": Mean.of(odds_coef * odds_ratio_loss(means[:, 0], means[:, 1]), batch.real),
    }
    return terms, pair_metrics(masked_sum(logps, mask), log_odds(means), batch)
