"""Whom the policy's samples are compared with: what draws every second sample of a prompt (`opponent` of an objective's protocol).

An opponent has `decoding`, `prefill` and `decode` like `nets` (models/networks.py), so that the sampler treats it as any network. The frozen
reference is `nets.as_reference()`; here is the mixture of the policy with it.

See: Munos et al. 2023 (arXiv:2312.00886), section 7.
"""

from __future__ import annotations

from typing import Any

import chex
from flax import struct

from rlhf_jax.errors import UserError
from rlhf_jax.types import Array


class Mixture(struct.PyTreeNode):
    """The geometric mixture π^(1−m) · π_ref^m, normalised at every token: both networks decode in lock-step, each with its own cache.

    It mixes logits before the sampler's temperature t divides them. That is the mixture of the two distributions at temperature t, since
    (1−m) z/t + m z_ref/t is the same either way and what normalises each of them cancels in the softmax. Top-k and top-p apply to the mixture.
    """

    policy: Any  # have `decoding`, `prefill` and `decode`
    ref: Any
    mixture: float = struct.field(pytree_node=False)  # m, [0, 1]

    def decoding(self) -> Mixture:
        """Both networks laid out for decoding. As models.Networks.decoding."""
        return self.replace(policy=self.policy.decoding(), ref=self.ref.decoding())

    def prefill(self, tokens: Array, positions: Array, segment_ids: Array, slots: int) -> tuple[Array, Any]:
        """Mixed logits [B, V] after the last prompt slot, and both caches. As models.Networks.prefill."""
        chex.assert_rank([tokens, positions, segment_ids], 2)
        chex.assert_equal_shape([tokens, positions, segment_ids])
        logits, cache = self.policy.prefill(tokens, positions, segment_ids, slots)
        ref_logits, ref_cache = self.ref.prefill(tokens, positions, segment_ids, slots)
        return self._mix(logits, ref_logits), (cache, ref_cache)

    def decode(self, token: Array, position: Array, slot: Array, visible: Array, cache: Any) -> tuple[Array, Any]:
        """Mixed logits [B, V] after one more token per row, and both caches. As models.Networks.decode."""
        chex.assert_rank([token, position], 1)
        chex.assert_equal_shape([token, position])
        logits, own_cache = self.policy.decode(token, position, slot, visible, cache[0])
        ref_logits, ref_cache = self.ref.decode(token, position, slot, visible, cache[1])
        return self._mix(logits, ref_logits), (own_cache, ref_cache)

    def _mix(self, logits: Array, ref_logits: Array) -> Array:
        if logits.shape != ref_logits.shape:
            raise UserError(f"config.reference_from: the reference's vocabulary has {ref_logits.shape[-1]} entries and config.model.vocab_size is "
                            f"{logits.shape[-1]}: only distributions over the same tokens can be mixed")
        return (1.0 - self.mixture) * logits + self.mixture * ref_logits
