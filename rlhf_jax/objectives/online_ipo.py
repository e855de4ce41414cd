"""ONLINE IPO: IPO on pairs that the policy has just sampled itself and the run's score has judged.

    y, y' ~ π(·|x),   y_w the one with the higher score, y_l the other
    L = ( h − 1/(2τ) )²,   h = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)

Use: as online DPO, where clear-cut verdicts would drive the margin on without end; its expected gradient is that of self-play (Nash-MD with m = 0).
See: Calandriello et al. 2024, eq. 11 (arXiv:2403.08635); Guo et al. 2024, OAIF (arXiv:2402.04792), whose τ is the default.
Deviation: the judge is the run's scalar score, a verdict where the paper has a probability of preference; a tie is counted and gives no gradient; a
truncated sample's score pays missing_eos_penalty, as in TRL (0 is the paper's).
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.objectives._online_pairs import JudgedPairs, judged_reading, prepare, without_ties
from rlhf_jax.objectives.ipo import ipo_loss
from rlhf_jax.types import Array, Mean

__all__ = ["loss", "prepare"]

NEEDS = {"reference": "", "reward": "", "pairs": ""}
DEFAULTS = {"tau": 1.0, "missing_eos_penalty": 1.0}
RANGES = {"tau": (1e-4, math.inf), "missing_eos_penalty": (0.0, math.inf)}


def loss(nets: Any, batch: JudgedPairs, keys: Array | None, *, tau: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    _, ratios, metrics = judged_reading(nets, batch, keys, "online_ipo", beta=tau)
    return {"ipo": without_ties(ipo_loss(ratios[:, 0], ratios[:, 1], tau=tau), batch)}, metrics
