"""ORPO: fine-tuning on the chosen responses, with the odds ratio of the two responses as a penalty; SFT and alignment in one stage.

    L = mean over the chosen responses' tokens of −log π(y_t)  +  λ · mean over pairs of −log σ( log odds(y_w) − log odds(y_l) )
    odds(y) = p / (1 − p),   p = π(y|x)^(1/|y|)

Use: from a base model to an aligned one in a single run, without a reference.
See: Hong et al. 2024, eq. 4, 6 and 7 (arXiv:2403.07691).
Deviation: none with nll_over = "response", the first term over the chosen responses' tokens; the authors' code and TRL take those of the prompts
too, which is "all", and call λ β. Where p is within 1e-6 of 1, its odds are held there.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives._pairs import pair_metrics, policy_reading
from rlhf_jax.ops.masking import loss_tokens, masked_mean, masked_sum
from rlhf_jax.ops.odds import log_odds
from rlhf_jax.types import Array, Comparisons, Mean, Sequences


def every_token(seqs: Sequences) -> Sequences:
    """The same rows with a log-prob at every token that has one, the prompt's too.

    Args:
      seqs: sequences with [..., T] leaves.
    """
    chex.assert_equal_shape([seqs.loss_mask, seqs.segment_ids])
    return seqs.replace(loss_mask=jnp.ones_like(seqs.loss_mask), loss_positions=None)


NLL_OVER = {"response": lambda seqs: seqs, "all": every_token}
DEFAULTS = {"odds_coef": 0.1, "nll_over": "response"}
RANGES = {"odds_coef": (0.0, math.inf), "nll_over": NLL_OVER}


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


def loss(
    nets: Any, batch: Comparisons, keys: Array | None, *, odds_coef: float, nll_over: str
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """A token term and a pair term; the implicit reward is the log odds.

    Args:
      odds_coef: λ, weight of the odds ratio, ≥ 0.
      nll_over: which tokens of the chosen row the likelihood is taken of: "response", the paper's, or "all", prompt and response, for which the
        head runs at every position.
    """
    mask = loss_tokens(batch.seqs)
    logps, counted = policy_reading(nets, batch.replace(seqs=NLL_OVER[nll_over](batch.seqs)), keys)
    means = masked_mean(logps, mask)
    terms = {
        "nll": Mean.of(-logps[:, 0], counted[:, 0] & batch.real[:, None]),
        "odds_ratio": Mean.of(odds_coef * odds_ratio_loss(means[:, 0], means[:, 1]), batch.real),
    }
    return terms, pair_metrics(masked_sum(logps, mask), log_odds(means), batch)
