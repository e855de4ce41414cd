"""GSPO: GRPO with one ratio per completion, the geometric mean of its tokens', clipped as a whole.

    L = −1/G Σ_i min( s_i A_i, clip(s_i, 1 − clip_low, 1 + clip_high) A_i ),   s_i = ( π(o_i)/π_old(o_i) )^{1/|o_i|}
    A_i = (r_i − mean(r)) / (std(r) + eps)   over the G samples of one prompt

Use: mixtures of experts and long answers, where single tokens' ratios are noise; the reward is the sequence's, and so is the ratio.
See: Zheng et al. 2025, eq. 5 to 7 (arXiv:2507.18071); sequence_token: eq. 13.
Deviation: none; the clip bounds are the paper's and of another order than GRPO's. Advantages that differ within a row (a correction per token, an
entropy quantile) enter by their mean, unless ratio_level is sequence_token.
"""

from __future__ import annotations

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import clipped_loss, sequence_means

__all__ = ["loss", "prepare"]

NEEDS = _groups.NEEDS
DEFAULTS = {**_groups.DEFAULTS, **_groups.CLIP, "clip_low": 3e-4, "clip_high": 4e-4, "ratio_level": "sequence"}
RANGES = {**_groups.RANGES, **_groups.CLIP_RANGES}

loss = clipped_loss(sequence_means)
