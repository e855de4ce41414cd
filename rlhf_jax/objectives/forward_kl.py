"""FORWARD KL: distillation that matches the teacher's whole next-token distribution on given responses.

    L = mean over responses of  1/L_y Σ_t KL( T(·|x, y_<t) ‖ π(·|x, y_<t) ),   T and π at temperature τ

Use: train a small model on a larger one's distributions; it spreads over all that the teacher might say, good with demonstrations of its own.
See: Hinton et al. 2015 (arXiv:1503.02531), eq. 1; Kim & Rush 2016 (arXiv:1606.07947), word-level; Agarwal et al. 2024 (arXiv:2306.13649), eq. 2.
Deviation: none from Agarwal et al.; Hinton et al. multiply by τ². The teacher is the run's reference, over the same vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.objectives._distillation import against_teacher, response_weights
from rlhf_jax.ops import distillation
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.types import Array, Mean, Sequences

NEEDS = {"teacher": ""}
DEFAULTS = {"temperature": 1.0}
RANGES = {"temperature": (1e-3, math.inf)}


def loss(nets: Any, batch: Sequences, keys: Array | None, *, temperature: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    out = against_teacher(nets, batch, keys, distillation.forward_kl, temperature=temperature)
    return {"forward_kl": Mean.of(out.from_teacher, response_weights(batch))}, {"logps/mean": Mean.of(out.logps, loss_tokens(batch))}
