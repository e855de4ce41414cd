"""What the objectives with a reference policy share: its log-probs, or one clear sentence where there are none."""

from __future__ import annotations

import chex

from rlhf_jax.errors import UserError
from rlhf_jax.types import Array, Sequences


def reference_logps(seqs: Sequences, objective: str) -> Array:
    """The reference's log-probs, [..., T] nats, which the step fills in before `prepare`.

    Args:
      seqs: the batch's sequences.
      objective: who asks, for the error.

    Raises:
      UserError: the run has no reference.
    """
    if seqs.ref_logps is None:
        raise UserError(f"objective {objective} needs the reference's log-probs: set config.reference_from to a run or checkpoint, "
                        "or to 'init' for the initial policy")
    chex.assert_equal_shape([seqs.ref_logps, seqs.tokens])
    return seqs.ref_logps
