"""The implicit reward of a policy trained by preference optimisation, used as a reward model.

    r(x, y) = β · Σ_t ( log π_DPO(y_t | x, y_<t) − log π_ref(y_t | x, y_<t) )

Flow: both frozen networks read the rollout's own tokens at temperature 1, the one they were trained at; the log-ratio is summed over the policy's own
tokens. β log Z(x), the same for all answers to a prompt, is left out: scores compare answers of one prompt.

See: Rafailov et al. 2023, "Direct Preference Optimization", eq. 5 (arXiv:2305.18290). Deviation: none.
"""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp

from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.types import Array, Rollout


def score(policy: Any, reference: Any, rollout: Rollout, *, beta: float) -> Array:
    """The implicit reward of each completion.

    Args:
      policy, reference: networks whose `ref(seqs)` returns `.logps` [B, T], nats, at temperature 1.
      rollout: `seqs` [B, T].
      beta: the policy's own, > 0; reward per nat.

    Returns:
      [B] float32, zero on filler rows.
    """
    chex.assert_rank(rollout.seqs.tokens, 2)
    logps, ref_logps = policy.ref(rollout.seqs).logps, reference.ref(rollout.seqs).logps
    chex.assert_equal_shape([logps, ref_logps, rollout.seqs.tokens])
    return jnp.where(rollout.real, beta * masked_sum(logps - ref_logps, rollout.seqs.loss_mask), 0.0)
