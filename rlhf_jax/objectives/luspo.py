"""LUSPO: GSPO with each completion weighed by its length, so that long ones are not undervalued.

    L = −1/G Σ_i |o_i| min( s_i A_i, clip(s_i, 1 − clip_low, 1 + clip_high) A_i ),   s_i = ( π(o_i)/π_old(o_i) )^{1/|o_i|}
    A_i = (r_i − mean(r)) / (std(r) + eps)   over the G samples of one prompt

Use: GSPO whose completions shrink during training.
See: Liu et al. 2026 (arXiv:2602.05261).
Deviation: none; clip bounds are GSPO's. Where the KL is on, it is summed over a completion's tokens too.
"""

from __future__ import annotations

from typing import Any

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import evaluate, penalties, sequence_sums
from rlhf_jax.ops.policy_gradient import clipped_surrogate, surrogate_is_clipped
from rlhf_jax.types import Array, Mean, Rollout

__all__ = ["loss", "prepare"]

NEEDS = _groups.NEEDS
DEFAULTS = {**_groups.DEFAULTS, **_groups.CLIP, "clip_low": 3e-4, "clip_high": 4e-4, "ratio_level": "sequence"}
RANGES = {**_groups.RANGES, **_groups.CLIP_RANGES}


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, clip_low: float, clip_high: float, dual_clip: float, ratio_level: str, off_policy_kl: float,
    beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool, entropy_coef: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    now = evaluate(nets, batch, keys, ratio_level=ratio_level, off_policy_kl=off_policy_kl)
    surrogate = clipped_surrogate(now.log_ratios, now.advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    clipped = surrogate_is_clipped(now.log_ratios, now.advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    terms = {"policy": sequence_sums(surrogate, now)} | penalties(
        now, sequence_sums, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
    return terms, now.metrics() | {"policy/clip_frac": Mean.of(clipped, now.mask)}
