"""DAPO: GRPO with a higher upper clip, a mean over tokens, no KL, and nothing from groups without signal or answers cut short.

    L = −1/Σ_i |o_i| Σ_i Σ_t min( ρ_t A_i, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_i )   over groups with std(r) > 0
    A_i = (r_i − mean(r)) / (std(r) + eps),   r_i = score − clip( (|o_i| − overlong_length + overlong_buffer) / overlong_buffer, 0, 1 )

Use: long reasoning with verifiable rewards, where GRPO's entropy collapses and its length grows without end.
See: Yu et al. 2025, eq. 8 to 13 (arXiv:2503.14476).
Deviation: dynamic sampling is the filter alone: groups of equal scores are left out and counted, and no other prompts are sampled in their place,
so batches shrink; TRL keeps those groups' tokens in the denominator. overlong_length is the budget of configs/dapo.py and the buffer a fifth of it,
as the paper's 4096 of 20480 tokens.
"""

from __future__ import annotations

from typing import Any

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import evaluate, penalties, token_means
from rlhf_jax.ops.policy_gradient import clipped_surrogate, surrogate_is_clipped
from rlhf_jax.types import Array, Mean, Rollout

__all__ = ["loss", "prepare"]

NEEDS = _groups.NEEDS
DEFAULTS = {
    **_groups.DEFAULTS, **_groups.CLIP, "clip_high": 0.28, "overlong_length": 512, "overlong_buffer": 102, "mask_truncated": True,
    "filter_groups": True,
}
RANGES = {**_groups.RANGES, **_groups.CLIP_RANGES}


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, clip_low: float, clip_high: float, dual_clip: float, ratio_level: str, off_policy_kl: float,
    beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool, entropy_coef: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    now = evaluate(nets, batch, keys, ratio_level=ratio_level, off_policy_kl=off_policy_kl)
    surrogate = clipped_surrogate(now.log_ratios, now.advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    clipped = surrogate_is_clipped(now.log_ratios, now.advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    terms = {"policy": token_means(surrogate, now)} | penalties(
        now, token_means, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
    return terms, now.metrics() | {"policy/clip_frac": Mean.of(clipped, now.mask)}
