"""ONLINE DPO: DPO on pairs that the policy has just sampled itself and the run's score has judged.

    y, y' ~ π(·|x),   y_w the one with the higher score, y_l the other
    L = −log σ( β [log π(y_w|x) − log π_ref(y_w|x)]  −  β [log π(y_l|x) − log π_ref(y_l|x)] )

Use: a reward and prompts, but the simplicity of DPO: no critic, no advantages, and pairs that never go stale.
See: Guo et al. 2024, OAIF, algorithm 1 with eq. 1 (arXiv:2402.04792).
Deviation: the judge is the run's scalar score, not a prompted LLM; a tie is counted and gives no gradient (TRL trains on it as if the first had won);
a truncated sample's score pays missing_eos_penalty, as in TRL (0 is the paper's).
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.objectives._online_pairs import JudgedPairs, judged_reading, prepare, without_ties
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.types import Array, Mean

__all__ = ["loss", "prepare"]

NEEDS = {"reference": "", "reward": "", "pairs": ""}
DEFAULTS = {"beta": 0.1, "missing_eos_penalty": 1.0}
RANGES = {"beta": (1e-6, math.inf), "missing_eos_penalty": (0.0, math.inf)}


def loss(nets: Any, batch: JudgedPairs, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    _, ratios, metrics = judged_reading(nets, batch, keys, "online_dpo", beta=beta)
    return {"dpo": without_ties(dpo_loss(ratios[:, 0], ratios[:, 1], beta=beta), batch)}, metrics
