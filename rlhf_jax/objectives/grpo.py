"""GRPO: a policy gradient whose baseline is the mean score of the other samples of the same prompt.

    L = −1/G Σ_i 1/|o_i| Σ_t [ min( ρ_t A_i, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_i )  −  β k3_t ],   ρ_t = π/π_old
    A_i = (r_i − mean(r)) / (std(r) + eps)   over the G samples of one prompt

Use: online RL with verifiable or model rewards and no critic; many samples of one prompt are cheap.
See: Shao et al. 2024, DeepSeekMath, eq. 3 and 4 (arXiv:2402.03300).
Deviation: std is the unbiased one, as in every public implementation; clip bounds may differ; a group whose scores are all the same has A = 0
exactly; a row that is not trained on does not count in G; β = 0 needs no reference. What else can be set is off: dual clipping, entropy bonus,
correction for another sampler, ratios of whole sequences, and so on.
"""

from __future__ import annotations

from typing import Any

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import evaluate, penalties, sequence_means
from rlhf_jax.ops.policy_gradient import clipped_surrogate, surrogate_is_clipped
from rlhf_jax.types import Array, Mean, Rollout

__all__ = ["loss", "prepare"]

NEEDS = _groups.NEEDS
DEFAULTS = {**_groups.DEFAULTS, **_groups.CLIP, "beta": 0.04}
RANGES = {**_groups.RANGES, **_groups.CLIP_RANGES}


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, clip_low: float, clip_high: float, dual_clip: float, ratio_level: str, off_policy_kl: float,
    beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool, entropy_coef: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    now = evaluate(nets, batch, keys, ratio_level=ratio_level, off_policy_kl=off_policy_kl)
    surrogate = clipped_surrogate(now.log_ratios, now.advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    clipped = surrogate_is_clipped(now.log_ratios, now.advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    terms = {"policy": sequence_means(surrogate, now)} | penalties(
        now, sequence_means, beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
    return terms, now.metrics() | {"policy/clip_frac": Mean.of(clipped, now.mask)}
