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

from rlhf_jax.objectives import _groups
from rlhf_jax.objectives._groups import prepare
from rlhf_jax.objectives._policy import clipped_loss, sequence_means

__all__ = ["loss", "prepare"]

NEEDS = _groups.NEEDS
DEFAULTS = {**_groups.DEFAULTS, **_groups.CLIP, "beta": 0.04}
RANGES = {**_groups.RANGES, **_groups.CLIP_RANGES}

loss = clipped_loss(sequence_means)
