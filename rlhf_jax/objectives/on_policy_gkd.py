"""ON-POLICY GKD: distillation by a generalised Jensen–Shannon divergence on responses that the student samples itself.

    L = E_{y ~ π(·|x)} [ 1/L_y Σ_t JSD_β( T(·|x, y_<t) ‖ π(·|x, y_<t) ) ],   T and π at temperature τ
    JSD_β( T ‖ π ) = β KL( T ‖ M ) + (1 − β) KL( π ‖ M ),   M = β T + (1 − β) π

Use: distil without a gap between what the student was trained on and what it says, at the price of sampling; prompts alone, no reward.
See: Agarwal et al. 2024, eq. 1, 2 and algorithm 1 with λ = 1 (arXiv:2306.13649).
Deviation: every response is the student's (λ = 1); `gkd` is λ = 0, and nothing mixes the two. As in the paper no gradient flows through the
sampling. β = 0 and 1, where the divergence is 0, are refused. config.sampling.temperature is what the student draws at; τ, which both
distributions are compared at, is apart from it. TRL averages over tokens, the paper and we over each response first.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from rlhf_jax.objectives._distillation import against_teacher, response_weights
from rlhf_jax.objectives._rollouts import length_metrics
from rlhf_jax.ops.distillation import generalised_jsd
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.types import Array, Mean, Rollout

NEEDS = {"teacher": ""}
DEFAULTS = {"beta": 0.5, "temperature": 1.0}
RANGES = {"beta": (1e-3, 1.0 - 1e-3), "temperature": (1e-3, math.inf)}


def loss(nets: Any, batch: Rollout, keys: Array | None, *, beta: float, temperature: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    out = against_teacher(nets, batch.seqs, keys, functools.partial(generalised_jsd, beta=beta), temperature=temperature)
    metrics = length_metrics(batch) | {"logps/mean": Mean.of(out.logps, loss_tokens(batch.seqs))}
    return {"on_policy_gkd": Mean.of(out.from_teacher, response_weights(batch.seqs))}, metrics
