"""REVERSE KL: distillation that keeps the student to what the teacher is sure of, on given responses.

    L = mean over responses of  1/L_y Σ_t KL( π(·|x, y_<t) ‖ T(·|x, y_<t) ),   T and π at temperature τ

Use: train a student too small to say all that the teacher might: it gives up modes and puts no mass where the teacher has none.
See: Agarwal et al. 2024 (arXiv:2306.13649), eq. 2; Gu et al. 2024, MiniLLM (arXiv:2306.08543), for sequences.
Deviation: none; the KL is exact at each token of the given responses, and no gradient flows through which responses these are. The teacher is
the run's reference, over the same vocabulary.
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
    out = against_teacher(nets, batch, keys, distillation.reverse_kl, temperature=temperature)
    return {"reverse_kl": Mean.of(out.from_teacher, response_weights(batch))}, {"logps/mean": Mean.of(out.logps, loss_tokens(batch))}
