"""GKD: distillation by a generalised Jensen–Shannon divergence on given responses.

    L = mean over responses of  1/L_y Σ_t JSD_β( T(·|x, y_<t) ‖ π(·|x, y_<t) ),   T and π at temperature τ
    JSD_β( T ‖ π ) = β KL( T ‖ M ) + (1 − β) KL( π ‖ M ),   M = β T + (1 − β) π

Use: distil where neither KL alone is right: β near 0 behaves like forward KL, near 1 like reverse KL, and the loss is bounded.
See: Agarwal et al. 2024, eq. 1 and 2 (arXiv:2306.13649).
Deviation: none. At β = 0 and 1 the divergence is 0, so they are refused: `forward_kl` and `reverse_kl` are their limits, which TRL puts in
their place. TRL averages over the tokens of the batch, the paper and we over each response first. The teacher is the run's reference, over
the same vocabulary; no factor τ². λ = 0 of the paper; `on_policy_gkd` has the student's own samples.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from rlhf_jax.objectives._distillation import against_teacher, response_weights
from rlhf_jax.ops.distillation import generalised_jsd
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.types import Array, Mean, Sequences

NEEDS = {"teacher": ""}
DEFAULTS = {"beta": 0.5, "temperature": 1.0}
RANGES = {"beta": (1e-3, 1.0 - 1e-3), "temperature": (1e-3, math.inf)}


def loss(nets: Any, batch: Sequences, keys: Array | None, *, beta: float, temperature: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    out = against_teacher(nets, batch, keys, functools.partial(generalised_jsd, beta=beta), temperature=temperature)
    return {"gkd": Mean.of(out.from_teacher, response_weights(batch))}, {"logps/mean": Mean.of(out.logps, loss_tokens(batch))}
