"""XPO: online DPO against samples of the reference, with a bonus for exploring away from them.

    y ~ π(·|x),   ỹ ~ π_ref(·|x),   y_w the one with the higher score, y_l the other
    L = −log σ( β [log π(y_w|x) − log π_ref(y_w|x)]  −  β [log π(y_l|x) − log π_ref(y_l|x)] )  +  α log π(ỹ|x)

Use: online preference learning where the best responses are ones that the reference hardly ever gives: optimism leads there.
See: Xie et al. 2024, algorithm 1 (arXiv:2405.21046).
Deviation: each update sums over the pairs of its own rollout, not over all since the start, as in TRL; α is constant; the judge is the run's
scalar score; a tie is counted and its pair gives no gradient, while its ỹ stays in the bonus (TRL trains on it as if the policy's had won);
a truncated sample's score pays missing_eos_penalty, as in TRL (0 is the paper's).
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.objectives._online_pairs import JudgedPairs, contest_metrics, judge, judged_reading, paired, tie_metrics, without_ties
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.types import Array, Mean, PyTree, Rollout

NEEDS = {"reference": "", "reward": "", "pairs": ""}
DEFAULTS = {"beta": 0.1, "alpha": 1e-5, "missing_eos_penalty": 1.0}
RANGES = {"beta": (1e-6, math.inf), "alpha": (0.0, math.inf), "missing_eos_penalty": (0.0, math.inf)}


def optimism(logps: Array, *, alpha: float) -> Array:
    """Unreduced α log π(ỹ|x), [B] nats: minimised, it moves mass away from what the reference says, to where nothing has been tried.

    Args:
      logps: log π(ỹ|x), sums over the reference's samples, [B] nats.
      alpha: coefficient of the bonus, ≥ 0; 0 leaves DPO on the pairs.

    See: Xie et al. 2024, algorithm 1, line 6.
    """
    chex.assert_rank(logps, 1)
    return alpha * logps


def opponent(nets: Any) -> Any:
    """The reference."""
    return nets.as_reference()


def prepare(
    nets: Any, batch: Rollout, carry: PyTree, key: Array, *, missing_eos_penalty: float
) -> tuple[JudgedPairs, PyTree, dict[str, Mean]]:
    pairs = judge(*paired(batch, missing_eos_penalty=missing_eos_penalty), opponent=True)
    wins = jnp.where(pairs.tied, 0.5, pairs.own[:, 0])
    return pairs, carry, contest_metrics(batch, wins, pairs.real) | tie_metrics(pairs)


def loss(nets: Any, batch: JudgedPairs, keys: Array | None, *, beta: float, alpha: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios, metrics = judged_reading(nets, batch, keys, "xpo", beta=beta)
    of_reference = jnp.where(batch.own, 0.0, logps).sum(-1)
    terms = {
        "dpo": without_ties(dpo_loss(ratios[:, 0], ratios[:, 1], beta=beta), batch),
        "optimism": Mean.of(optimism(of_reference, alpha=alpha), batch.real),
    }
    return terms, metrics
