"""PPO-PTX: PPO that goes on training on a second data set, so that alignment does not cost what the model knew.

    L = L_PPO  −  γ · E_{x ~ D_pretrain} [ log π(x) ],   γ = ptx_coef

Use: RLHF whose policy loses general skill (the "alignment tax"): mix in text of the kind that it was pre-trained on, or demonstrations.
See: Ouyang et al. 2022, InstructGPT, eq. 2 (arXiv:2203.02155), where γ = 27.8; L_PPO is `ppo`'s.
Deviation: as `ppo`; log π(x) is the mean over the tokens trained on, as in SFT, which the paper leaves open, and at the sampler's temperature.
Each iteration takes as many rows of the second data set, config.ptx, as completions (InstructGPT: eight times as many), which minibatches split
along with them. ptx_coef = 0 is PPO.
"""

from __future__ import annotations

import math
from typing import Any

import chex

from rlhf_jax.errors import UserError
from rlhf_jax.objectives import ppo
from rlhf_jax.objectives.ppo import init_carry, prepare
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.types import Array, Mean, Rollout

__all__ = ["init_carry", "loss", "prepare", "ptx_loss"]

NEEDS = {**ppo.NEEDS, "ptx": "ptx_coef"}
DEFAULTS = {**ppo.DEFAULTS, "ptx_coef": 27.8}
RANGES = {**ppo.RANGES, "ptx_coef": (0.0, math.inf)}


def ptx_loss(logps: Array, *, ptx_coef: float) -> Array:
    """−ptx_coef · log π of each token of the second data set, [B, T] nats.

    Args:
      logps: [B, T] nats.
      ptx_coef: γ, the weight of the second data set beside PPO's policy loss, ≥ 0; 0 = PPO.

    See: Ouyang et al. 2022, eq. 2.
    """
    chex.assert_rank(logps, 2)
    return -ptx_coef * logps


def loss(
    nets: Any, batch: Rollout, keys: Array | None, *, clip: float, dual_clip: float, value_clip: float, value_coef: float, entropy_coef: float,
    ptx_coef: float,
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    chex.assert_rank(batch.seqs.tokens, 2)
    terms, metrics = ppo.loss(nets, batch, keys, clip=clip, dual_clip=dual_clip, value_clip=value_clip, value_coef=value_coef,
                              entropy_coef=entropy_coef)
    if ptx_coef:
        if batch.ptx is None:
            raise UserError("objective ppo_ptx needs rows of a second data set beside the rollout: config.ptx names it")
        logps = nets.policy(batch.ptx, keys).logps
        terms["ptx"] = Mean.of(ptx_loss(logps, ptx_coef=ptx_coef), loss_tokens(batch.ptx))
    return terms, metrics
