"""DAPO: GRPO with a higher upper clip, a mean over tokens, no KL, and nothing from groups without signal or answers cut short.

    L = −1/Σ_i |o_i| Σ_i Σ_t min( ρ_t A_i, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_i )   over groups with std(r) > 0
    A_i = (r_i − mean(r)) / (std(r) + eps),   r_i = score − clip( (|o_i| − overlong_length + overlong_buffer) / overlong_buffer, 0, 1 )

Use: long reasoning with verifiable rewards, where GRPO's entropy collapses and its length grows without end.
See: Yu et al. 2025, eq. 8 to 13 (arXiv:2503.14476).
Deviation: groups of equal scores are left out and counted; config.schedule.refill samples other prompts in their place, for as many rounds as it
says (9 in configs/dapo.py) and not without end. TRL keeps those groups' tokens in the denominator. overlong_length is the budget of
configs/dapo.py and the buffer a fifth of it, as the paper's 4096 of 20480 tokens.
"""

from __future__ import annotations

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import clipped_loss, token_means

__all__ = ["loss", "prepare"]

NEEDS = _groups.NEEDS
DEFAULTS = {
    **_groups.DEFAULTS, **_groups.CLIP, "clip_high": 0.28, "overlong_length": 512, "overlong_buffer": 102, "mask_truncated": True,
    "filter_groups": True,
}
RANGES = {**_groups.RANGES, **_groups.CLIP_RANGES}

loss = clipped_loss(token_means)
