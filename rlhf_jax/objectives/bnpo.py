"""BNPO: GRPO averaged over all tokens at once, so that a token weighs the same in a long completion as in a short one.

    L = −1/Σ_i |o_i| Σ_i Σ_t [ min( ρ_t A_i, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_i )  −  β k3_t ]
    A_i = (r_i − mean(r)) / (std(r) + eps)   over the G samples of one prompt

Use: GRPO whose long completions learn too little; `dapo` without its other three changes.
See: the loss of that name in TRL 1.16 (huggingface.co/docs/trl, GRPOConfig.loss_type, 2025); the token mean: Yu et al. 2025, eq. 8
(arXiv:2503.14476). Not Xiao et al. 2025, whose BNPO scales advantages by a Beta density.
Deviation: the mean is over the batch of an update; TRL's is over a device's microbatch, which changes with accumulation.
"""

from __future__ import annotations

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import clipped_loss, token_means

__all__ = ["loss", "prepare"]

NEEDS = _groups.NEEDS
DEFAULTS = {**_groups.DEFAULTS, **_groups.CLIP}
RANGES = {**_groups.RANGES, **_groups.CLIP_RANGES}

loss = clipped_loss(token_means)
