"""Masks and masked reductions. An empty mask gives zero and a finite gradient, never NaN; masked entries may hold anything.

`loss_tokens` is the one definition of the tokens that a loss counts; the reductions take that mask, or any other.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from rlhf_jax.types import Array, Sequences


def masked_sum(x: Array, mask: Array, axis: int = -1) -> Array:
    """Σ x where mask.

    Args:
      x: [..., T].
      mask: [..., T] bool, same shape.
      axis: the reduced axis.

    Returns:
      [...], zero where the mask is empty.
    """
    chex.assert_equal_shape([x, mask])
    return jnp.where(mask, x, 0.0).sum(axis)


def masked_mean(x: Array, mask: Array, axis: int = -1) -> Array:
    """Σ x·mask / Σ mask along `axis`, zero where the mask is empty.

    Args:
      x: [..., T].
      mask: [..., T] bool, same shape.
      axis: the reduced axis.

    Returns:
      [...].
    """
    chex.assert_equal_shape([x, mask])
    return masked_sum(x, mask, axis) / jnp.maximum(mask.sum(axis), 1)


def masked_moments(x: Array, mask: Array) -> tuple[Array, Array]:
    """Mean and unbiased variance over every masked entry of the whole array, scalars.

    Args:
      x: any shape.
      mask: same shape, bool.
    """
    chex.assert_equal_shape([x, mask])
    count = mask.sum()
    mean = jnp.where(mask, x, 0.0).sum() / jnp.maximum(count, 1)
    mean = mean + jnp.where(mask, x - mean, 0.0).sum() / jnp.maximum(count, 1)  # the rounding of a mean must not pass for variance
    variance = jnp.where(mask, (x - mean) ** 2, 0.0).sum() / jnp.maximum(count - 1, 1)
    return mean, variance


def whiten(x: Array, mask: Array, *, keep_mean: bool, eps: float = 1e-8) -> Array:
    """(x − mean) / √(var + eps) over the masked entries, plus the mean again if `keep_mean`; zero where not masked.

    Rewards are whitened keeping their mean, advantages without (Huang et al. 2023, "The N implementation details of RLHF with PPO").

    Args:
      x: any shape.
      mask: same shape, bool.
      keep_mean: add the mean back.
      eps: added to the variance.
    """
    chex.assert_equal_shape([x, mask])
    mean, variance = masked_moments(x, mask)
    centred = (x - mean) * (variance + eps) ** -0.5
    return jnp.where(mask, centred + mean if keep_mean else centred, 0.0)


def last_index(mask: Array) -> Array:
    """Index of the last true entry along the last axis, [...] int32; 0 where there is none.

    Args:
      mask: [..., T] bool.
    """
    chex.assert_type(mask, bool)
    index = mask.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
    return jnp.where(mask.any(-1), index, 0)


def last_real_index(segment_ids: Array) -> Array:
    """Index of each row's last real token, [...] int32; 0 for a row of padding only.

    Args:
      segment_ids: [..., T] int32, 0 = padding; padding may stand on either side.
    """
    chex.assert_type(segment_ids, int)
    return last_index(segment_ids != 0)


def place_at_last(x: Array, mask: Array) -> Array:
    """`x` at the last true entry of `mask`, zero elsewhere: a score becomes the reward of the last response token.

    Args:
      x: [...]; may hold anything where the mask is empty.
      mask: [..., T] bool.

    Returns:
      [..., T], all zero where the mask is empty.
    """
    chex.assert_shape(mask, (*x.shape, None))
    index = jnp.broadcast_to(jnp.arange(mask.shape[-1]), mask.shape)
    return jnp.where(mask & (index == last_index(mask)[..., None]), x[..., None], 0.0)


def at_last_real(x: Array, segment_ids: Array) -> Array:
    """`x` at each row's last real token: where a reward model's score is read.

    Args:
      x: [..., T].
      segment_ids: [..., T] int32, same shape.

    Returns:
      [...].
    """
    chex.assert_equal_shape([x, segment_ids])
    return jnp.take_along_axis(x, last_real_index(segment_ids)[..., None], axis=-1)[..., 0]


def segment_starts(segment_ids: Array) -> Array:
    """True at each segment's first token and on padding: where law 1 makes every log-prob zero. [..., T] bool.

    Args:
      segment_ids: [..., T] int32.
    """
    chex.assert_type(segment_ids, int)
    before = jnp.concatenate([jnp.zeros_like(segment_ids[..., :1]), segment_ids[..., :-1]], axis=-1)
    return (segment_ids == 0) | (segment_ids != before)


def segment_sum(x: Array, segment_ids: Array) -> Array:
    """Σ x over each token's own segment, written at every one of its tokens; zero on padding. [..., T].

    Args:
      x: [..., T]; may hold anything on padding.
      segment_ids: [..., T] int32, same shape; a segment's tokens stand together.
    """
    chex.assert_equal_shape([x, segment_ids])
    same = (segment_ids[..., :, None] == segment_ids[..., None, :]) & (segment_ids != 0)[..., None, :]
    return jnp.where(same, x[..., None, :], 0.0).sum(-1)  # one fused reduction: no [T, T] array of the numbers is kept


def loss_tokens(seqs: Sequences) -> Array:
    """The tokens that a loss counts: those of `loss_mask` that have a log-prob at all (law 1), [..., T] bool.

    Padding and the first token of a segment never count, whatever `loss_mask` says there.

    Args:
      seqs: sequences with [..., T] leaves.
    """
    chex.assert_equal_shape([seqs.loss_mask, seqs.segment_ids])
    return seqs.loss_mask & ~segment_starts(seqs.segment_ids)
