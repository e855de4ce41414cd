"""f-DPO: DPO with another divergence than the reverse KL between the policy and the reference.

    L = −log σ( β f'( π(y_w|x)/π_ref(y_w|x) ) − β f'( π(y_l|x)/π_ref(y_l|x) ) )
    f'(t):  log t (reverse_kl: DPO),   1 − 1/t (forward_kl),   log 2t/(1 + t) (jensen_shannon),   (1 − t⁻ᵅ)/α (alpha)

Use: trade the reward for diversity and calibration: from mode-seeking (reverse_kl) over jensen_shannon and alpha to forward_kl.
See: Wang et al. 2023 (arXiv:2309.16240).
Deviation: none; scores are shifted to be 0 at t = 1, and exponentials saturate at e³⁰, with zero gradient beyond (ops/divergences). TRL's
f_alpha_divergence_coef is 1 − α.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.ops.divergences import SCORES
from rlhf_jax.types import Array, Comparisons, Mean

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.1, "divergence": "jensen_shannon", "alpha": 0.5}
RANGES = {"beta": (1e-6, math.inf), "alpha": (0.0, 1.0), "divergence": SCORES}


def loss(
    nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, divergence: str, alpha: float
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """DPO's loss on the scores of a divergence.

    Args:
      beta: weight of the divergence, inverse temperature of the implicit reward, > 0.
      divergence: reverse_kl, forward_kl, jensen_shannon or alpha.
      alpha: of the divergence "alpha", which lies between the reverse KL (0) and the forward KL (1); the others do not read it.
    """
    logps, ratios = pair_reading(nets, batch, keys, "f_dpo")
    scores = SCORES[divergence](ratios, alpha=alpha)
    losses = dpo_loss(scores[:, 0], scores[:, 1], beta=beta)
    return {"f_dpo": Mean.of(losses, batch.real)}, pair_metrics(logps, beta * scores, batch)
