"""What the distillations share: the divergence from a frozen teacher, the run's reference, at every token.

The teacher's trunk runs in `loss`, not in `prepare`: a pass over the batch needs it once either way, but kept from `prepare` its hidden states
of the whole batch, [B, T, D], would live until the last microbatch, whereas here one microbatch's do. Its logits exist for one chunk of the
head at a time, beside the student's. Gradients flow through the student's distribution alone, on the tokens as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.ops import vocab
from rlhf_jax.ops.masking import loss_tokens, segment_sum
from rlhf_jax.types import Array, Sequences

Divergence = Callable[[Array, Array], Array]  # (student, teacher), logits [..., V] each -> [...]


def against_teacher(nets: Any, seqs: Sequences, keys: Array | None, divergence: Divergence, *, temperature: float) -> Any:
    """The student's reading of `seqs` and how far its next-token distribution is from the teacher's.

    Args:
      nets: has `policy`, `ref`, `unembed` and `temperature`, which divides both networks' logits and is taken back here.
      seqs: [B, T].
      keys: [B] typed keys for the student's dropout, or None.
      divergence: from ops.distillation.
      temperature: divides the logits of both in the divergence, > 0, whatever temperature the student samples at; 1 = off.

    Returns:
      `logps` of the tokens and the divergence `from_teacher`, [B, T] nats each, law 1's alignment.

    Raises:
      UserError: the two networks' vocabularies differ in size.
    """
    chex.assert_rank(seqs.tokens, 2)
    hidden = nets.ref(seqs, want=("hidden",)).hidden
    before = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)  # law 1: the state of t − 1 predicts token t
    scale = nets.temperature / temperature

    def logps(logits: Array, target: Array, *, teacher: Array) -> Array:  # every function gets what goes along
        return vocab.logps(logits, target)

    def from_teacher(logits: Array, target: Array, *, teacher: Array) -> Array:
        others = jax.lax.stop_gradient(nets.unembed("ref", teacher))
        if others.shape != logits.shape:
            raise UserError(f"config.reference_from: the teacher's vocabulary has {others.shape[-1]} entries and config.model.vocab_size is "
                            f"{logits.shape[-1]}: a distribution can only be compared with one over the same tokens")
        return divergence(scale * logits, scale * others)

    return nets.policy(seqs, keys, want=(logps, from_teacher), along={"teacher": before})


def response_weights(seqs: Sequences) -> Array:
    """1 / L_y at each of a response's L_y loss tokens, 0 elsewhere: `Mean.of(x, weights)` averages over each response first, then over them.

    Args:
      seqs: [B, T]; of packed rows every segment is a response of its own.

    Returns:
      [B, T] float32, which sums to the number of responses.

    See: Agarwal et al. 2024, eq. 2.
    """
    chex.assert_rank(seqs.tokens, 2)
    mask = loss_tokens(seqs).astype(jnp.float32)
    return mask / jnp.maximum(segment_sum(mask, seqs.segment_ids), 1.0)
