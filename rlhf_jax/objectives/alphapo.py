"""AlphaPO: SimPO with a reward that is a power of the probability in place of its logarithm.

    L = −log σ( β r_w − β r_l − γ ),   r = ( 1 − p⁻ᵅ ) / α,   p = π(y|x)^(1/|y|)

Use: SimPO whose chosen responses lose likelihood (α > 0), or which goes too far (α < 0).
See: Gupta et al. 2025 (arXiv:2501.03884).
Deviation: none; α = 0 is SimPO, and p⁻ᵅ saturates at e³⁰. γ is the margin itself: the default reads the paper's 0.1 as γ/β, at β = 2.5 (TRL's
index of papers takes γ = 0.1).
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.objectives._pairs import pair_metrics, policy_reading
from rlhf_jax.objectives.simpo import simpo_loss
from rlhf_jax.ops.divergences import alpha_score
from rlhf_jax.ops.masking import masked_mean, masked_sum
from rlhf_jax.types import Array, Comparisons, Mean

DEFAULTS = {"beta": 2.5, "gamma": 0.25, "alpha": 0.25}
RANGES = {"beta": (1e-6, math.inf), "gamma": (0.0, math.inf)}


def loss(
    nets: Any, batch: Comparisons, keys: Array | None, *, beta: float, gamma: float, alpha: float
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """SimPO's loss on other rewards.

    Args:
      beta: inverse temperature of the reward r, > 0.
      gamma: γ, by how much β r of the chosen response shall be the higher one, ≥ 0.
      alpha: α, shape of the reward: above 0 unlikely responses weigh more, below 0 likely ones; 0 = the logarithm.
    """
    logps, mask = policy_reading(nets, batch, keys)
    rewards = alpha_score(masked_mean(logps, mask), alpha=alpha)
    losses = simpo_loss(rewards[:, 0], rewards[:, 1], beta=beta, gamma=gamma)
    return {"alphapo": Mean.of(losses, batch.real)}, pair_metrics(masked_sum(logps, mask), beta * rewards, batch)
