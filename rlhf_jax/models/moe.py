"""Mixture of experts, dropless: every token goes to its k likeliest experts, whatever its neighbours choose.

    y = Σ_{e ∈ top k} w_e · down_e( act(gate_e x) · up_e x ),   w = softmax(router x), renormalised over the chosen if `renormalise`

Rows are sorted by expert and multiplied by `ragged_dot`, on every device for its own rows; over the mesh axis `expert` each device holds a share of
the experts, gathers the rows of its neighbours along that axis, and the partial results are summed and scattered back. No capacity, no dropped
token: neighbours never change a token's output.

The balance loss is that of Fedus et al. 2021 (arXiv:2101.03961, eq. 4) with k choices, per sequence in place of per batch, so that it neither
changes with the neighbours in a batch nor with gradient accumulation:

    E · Σ_e f_e P_e,   f_e = choices of e per token of the sequence, P_e = mean router probability of e
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layers import ACTIVATIONS, logical
from rlhf_jax.ops import partition
from rlhf_jax.types import Array


def route(logits: Array, k: int, renormalise: bool) -> tuple[Array, Array, Array]:
    """Who goes where.

    Args:
      logits: [N, E].
      k: experts per token.
      renormalise: whether the chosen weights sum to 1.

    Returns:
      weights [N, k] float32, experts [N, k] int32, probabilities [N, E] float32.
    """
    chex.assert_rank(logits, 2)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, k)
    if renormalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights, experts, probabilities


def mix(x: Array, weights: Array, experts: Array, gate: Array, up: Array, down: Array, activation: str, first: Array | int = 0) -> Array:
    """The chosen experts' weighted outputs, of the experts that are here.

    Args:
      x: [N, D].
      weights, experts: [N, k], of all experts.
      gate, up: [E', D, F]; down: [E', F, D], experts `first` … `first` + E' − 1.
      activation: a key of ACTIVATIONS.
      first: number of the first expert that is here.

    Returns:
      [N, D].
    """
    chex.assert_rank([x, weights, experts, gate, up, down], [2, 2, 2, 3, 3, 3])
    chex.assert_equal_shape([weights, experts])
    count, k = gate.shape[0], experts.shape[1]
    local = (experts - first).reshape(-1)
    here = (local >= 0) & (local < count)
    local = jnp.where(here, local, count)  # the others come last, behind every group
    order = jnp.argsort(local, stable=True)
    sizes = jnp.bincount(local, length=count + 1)[:count].astype(jnp.int32)
    rows = x[order // k]
    hidden = ACTIVATIONS[activation](jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jax.lax.ragged_dot(hidden, down, sizes)
    share = jnp.where(here, weights.reshape(-1), 0.0)[order].astype(out.dtype)
    out = jnp.where(here[order][:, None], out, 0.0) * share[:, None]
    return jnp.zeros_like(x).at[order // k].add(out)


def _over_experts(x: Array, weights: Array, experts: Array, gate: Array, up: Array, down: Array, activation: str, axes: tuple[str, str | None]
                  ) -> Array:
    """`mix` on one device of a mesh: the experts are spread over the first axis, their inner features over the second."""
    expert, tensor = axes
    x, weights, experts = (jax.lax.all_gather(y, expert, axis=0, tiled=True) for y in (x, weights, experts))
    y = mix(x, weights, experts, gate, up, down, activation, first=jax.lax.axis_index(expert) * gate.shape[0])
    if tensor is not None:
        y = jax.lax.psum(y, tensor)
    return jax.lax.psum_scatter(y, expert, scatter_dimension=0, tiled=True)


class Experts(nn.Module):
    """The experts of one layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, weights: Array, experts: Array) -> Array:
        c = self.config
        dtype, param_dtype = jnp.dtype(c.compute_dtype), jnp.dtype(c.param_dtype)

        def parameter(name: str, fan_in: int, fan_out: int, axes: tuple[str, ...], scale: float = 1.0) -> Array:
            init = logical(nn.initializers.normal(scale * fan_in**-0.5), *axes)
            return self.param(name, init, (c.experts, fan_in, fan_out), param_dtype).astype(dtype)

        gate = parameter("gate", c.hidden, c.expert_mlp, ("expert", "embed", "mlp"))
        up = parameter("up", c.hidden, c.expert_mlp, ("expert", "embed", "mlp"))
        down = parameter("down", c.expert_mlp, c.hidden, ("expert", "mlp", "embed"), (2 * c.layers) ** -0.5)
        flat = lambda y: y.reshape(-1, y.shape[-1])  # noqa: E731

        def local(x: Array, weights: Array, experts: Array, gate: Array, up: Array, down: Array, axes: Any = None) -> Array:
            args = flat(x), flat(weights), flat(experts), gate, up, down, c.activation
            return (mix(*args) if axes is None else _over_experts(*args, axes)).reshape(x.shape)

        rows = ("batch", partition.even("length", x.shape[1]), None)
        return partition.per_device(
            local, (x.astype(dtype), weights, experts, gate, up, down),
            (rows, rows, rows, ("expert", None, "mlp"), ("expert", None, "mlp"), ("expert", "mlp", None)), rows, ("expert", "mlp"),
        )


def balance(chosen: Array, probabilities: Array, segment_ids: Array) -> Array:
    """The balance loss of every sequence, spread evenly over its tokens: [B, T] float32, zero on padding.

    Args:
      chosen: [B, T, E] 1 where a token goes to an expert.
      probabilities: [B, T, E] of the router.
      segment_ids: [B, T] int32; each segment is a sequence.
    """
    chex.assert_rank([chosen, probabilities, segment_ids], [3, 3, 2])
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids != 0)[:, None, :] & (segment_ids != 0)[:, :, None]
    weights = same / jnp.maximum(same.sum(-1, keepdims=True), 1)  # [B, T, T], the mean over a token's own segment
    share = jnp.einsum("bts,bse->bte", weights, chosen)
    mean = jnp.einsum("bts,bse->bte", weights, probabilities)
    length = jnp.maximum(same.sum(-1), 1)
    return jnp.where(segment_ids != 0, chosen.shape[-1] * (share * mean).sum(-1) / length, 0.0)
