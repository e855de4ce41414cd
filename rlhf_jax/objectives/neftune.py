"""NEFTUNE: supervised fine-tuning with uniform noise on the input embeddings.

    L = mean over the batch's response tokens of  −log π(y_t | e + n),   n = α / √(L·D) · u,   u ~ Uniform(−1, 1) per token and feature

Use: SFT on few demonstrations, where noise on what the model reads keeps it from memorising them.
See: Jain et al. 2023, algorithm 1 (arXiv:2310.05914).
Deviation: none; e [L, D] are the embeddings of a row's L real tokens, and where several rows are packed into one, L is each one's own. The draw
depends on the row's key alone, padding gets none, and there is none in validation.
"""

from __future__ import annotations

import math
from typing import Any

import chex

from rlhf_jax.objectives.sft import nll_loss
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.types import Array, Mean, Sequences

DEFAULTS = {"noise_alpha": 5.0}
RANGES = {"noise_alpha": (0.0, math.inf)}


def loss(nets: Any, batch: Sequences, keys: Array | None, *, noise_alpha: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """SFT's loss of a policy that reads noise.

    Args:
      nets: its `policy` adds the noise.
      batch: [B, T].
      keys: [B], what the noise is drawn from; None = no noise.
      noise_alpha: α, ≥ 0: the noise of a whole row has a norm of about α / √3; 0 is SFT.
    """
    chex.assert_rank(batch.tokens, 2)
    logps = nets.policy(batch, keys, noise=noise_alpha).logps
    return {"nll": Mean.of(nll_loss(logps), loss_tokens(batch))}, {}
