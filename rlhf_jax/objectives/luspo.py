"""LUSPO: GSPO with each completion weighed by its length, so that long ones are not undervalued.

    L = −1/G Σ_i |o_i| min( s_i A_i, clip(s_i, 1 − clip_low, 1 + clip_high) A_i ),   s_i = ( π(o_i)/π_old(o_i) )^{1/|o_i|}
    A_i = (r_i − mean(r)) / (std(r) + eps)   over the G samples of one prompt

Use: GSPO whose completions shrink during training.
See: Liu et al. 2026 (arXiv:2602.05261).
Deviation: none; clip bounds are GSPO's. Where the KL is on, it is summed over a completion's tokens too.
"""

from __future__ import annotations

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import clipped_loss, sequence_sums

__all__ = ["loss", "prepare"]

NEEDS = _groups.NEEDS
DEFAULTS = {**_groups.DEFAULTS, **_groups.CLIP, "clip_low": 3e-4, "clip_high": 4e-4, "ratio_level": "sequence"}
RANGES = {**_groups.RANGES, **_groups.CLIP_RANGES}

loss = clipped_loss(sequence_sums)
