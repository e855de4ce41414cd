"""DR. GRPO: GRPO done right, without the two divisions that bias it: by the group's deviation and by the completion's length.

    L = −1/(G · length_scale) Σ_i Σ_t [ min( ρ_t A_i, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_i )  −  β k3_t ]
    A_i = r_i − mean(r)   over the G samples of one prompt

Use: GRPO whose wrong answers grow longer and longer, or whose batch mixes easy and hard prompts.
See: Liu et al. 2025, section 3 (arXiv:2503.20783).
Deviation: none; length_scale is a constant, as in the paper's code the budget for a completion (512 in configs/dr_grpo.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import chex

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import Evaluation, clipped_loss
from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.types import Array, Mean, Rollout

__all__ = ["loss", "prepare", "scaled_sums"]

NEEDS = _groups.NEEDS
DEFAULTS = {**_groups.DEFAULTS, **_groups.CLIP, "advantage_scale": "none", "length_scale": 512.0}
RANGES = {**_groups.RANGES, **_groups.CLIP_RANGES, "length_scale": (1.0, math.inf)}


def scaled_sums(x: Array, now: Evaluation, *, length_scale: float) -> Mean:
    """1/G Σ_i 1/length_scale Σ_t: the mean over rows of each row's sum over a constant.

    Args:
      x: [B, T].
      now: from `evaluate`.
      length_scale: what every row's sum over tokens is divided by, tokens, ≥ 1; as a rule sampling.max_new_tokens.
    """
    chex.assert_equal_shape([x, now.mask])
    return Mean.of(masked_sum(x, now.mask) / length_scale, now.rows)


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, clip_low: float, clip_high: float, dual_clip: float, ratio_level: str, off_policy_kl: float,
    beta: float, kl_estimator: str, kl_in: str, unbiased_kl: bool, entropy_coef: float, length_scale: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    chex.assert_equal_shape([batch.seqs.tokens, batch.sampler_logps])
    return clipped_loss(functools.partial(scaled_sums, length_scale=length_scale))(
        nets, batch, keys, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, ratio_level=ratio_level, off_policy_kl=off_policy_kl,
        beta=beta, kl_estimator=kl_estimator, kl_in=kl_in, unbiased_kl=unbiased_kl, entropy_coef=entropy_coef)
