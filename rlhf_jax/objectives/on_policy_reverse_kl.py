"""ON-POLICY REVERSE KL: distillation that keeps the student to what the teacher is sure of, on responses that the student samples itself.

    L = E_{y ~ π(·|x)} [ 1/L_y Σ_t KL( π(·|x, y_<t) ‖ T(·|x, y_<t) ) ],   T and π at temperature τ

Use: hand a large model's skill, reasoning above all, to a small one: each of the student's own tokens is judged by the teacher; no reward.
See: Agarwal et al. 2024, eq. 2 and algorithm 1 with λ = 1 and the reverse KL (arXiv:2306.13649); Gu et al. 2024, MiniLLM (arXiv:2306.08543).
Deviation: none from Agarwal et al. at λ = 1. The KL is exact at every token and no gradient flows through the sampling, so the later tokens'
share in the gradient of the sequence's KL, which MiniLLM keeps by a policy gradient, is left out. config.sampling.temperature is what the
student draws at; τ, which both distributions are compared at, is apart from it.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.objectives._distillation import against_teacher, response_weights
from rlhf_jax.objectives._rollouts import length_metrics
from rlhf_jax.ops import distillation
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.types import Array, Mean, Rollout

NEEDS = {"teacher": ""}
DEFAULTS = {"temperature": 1.0}
RANGES = {"temperature": (1e-3, math.inf)}


def loss(nets: Any, batch: Rollout, keys: Array | None, *, temperature: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    out = against_teacher(nets, batch.seqs, keys, distillation.reverse_kl, temperature=temperature)
    metrics = length_metrics(batch) | {"logps/mean": Mean.of(out.logps, loss_tokens(batch.seqs))}
    return {"on_policy_reverse_kl": Mean.of(out.from_teacher, response_weights(batch.seqs))}, metrics
