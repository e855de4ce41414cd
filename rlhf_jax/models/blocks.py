"""One layer: attention and a feed-forward branch, with norms where the family puts them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models import cache as kv
from rlhf_jax.models import moe, rope
from rlhf_jax.models.attention import Forked, Mask, attend_forked
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.causal import Rows, attend_rows
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layers import ACTIVATIONS, Linear, Norm, drop, pin
from rlhf_jax.types import Array

Choices = tuple[Array, Array]  # of a layer with experts: chosen and probabilities, [B, T, E] each
DROPOUTS = 16  # of an adapter's dropout in one layer, at most


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x)); `config.norm_placement` says where the norms stand."""

    config: ModelConfig
    window: int = 0  # tokens that a query sees; 0 = all
    experts: bool = False

    @nn.compact
    def __call__(
        self, x: Array, tables: dict[bool, rope.Tables], mask: Mask | Rows, keys: Array | None = None, index: Array | int = 0,
        cache: Cache | None = None, slot: Array | int | None = 0, reads: int = 0,
    ) -> tuple[Array, Cache | None, Choices | None]:
        c = self.config  # what comes out begins at slot `reads`: those before give keys and values only
        before, after = c.norm_placement != "post", c.norm_placement in ("post", "both")

        def branch(name: str, x: Array, run: Any, salt: Array | int) -> tuple[Array, Any]:
            h, extra = run(Norm(c, name=f"{name}_norm")(x) if before else x)
            h = Norm(c, name=f"{name}_post_norm")(h) if after else h
            return drop(h, keys, salt, c.dropout), extra

        attention = functools.partial(self._attention, tables=tables, mask=mask, keys=keys, index=index, cache=cache, slot=slot, reads=reads)
        feed_forward = functools.partial(self._feed_forward, keys=keys, index=index)
        h, cache = branch("attention", x, attention, 2 * index + 1)
        x = x[:, reads:]
        if c.norm_placement == "parallel":
            y, choices = branch("mlp", x, feed_forward, 2 * index + 2)
            return pin(x + h + y), cache, choices
        x = pin(x + h)
        h, choices = branch("mlp", x, feed_forward, 2 * index + 2)
        return pin(x + h), cache, choices

    def _attention(self, h: Array, *, tables: dict[bool, rope.Tables], mask: Mask | Rows, keys: Array | None, index: Array | int, cache: Cache | None,
                   slot: Array | int | None, reads: int) -> tuple[Array, Cache | None]:
        c, batch = self.config, h.shape[0]
        salt = DROPOUTS * index

        def project(name: str, h: Array, heads: int, axis: str, salt: Array | int) -> Array:
            return Linear(c, heads * c.head_dim, ("embed", axis), bias=c.qkv_bias, name=name)(h, keys, salt)

        if self.has_variable("params", "query_key_value"):  # layout.joined
            sizes = [heads * c.head_dim for heads in (c.heads, c.kv_heads, c.kv_heads)]
            both = Linear(c, sum(sizes), ("embed", None), bias=c.qkv_bias, name="query_key_value")(h)
            query, key, value = jnp.split(both, [sizes[0], sizes[0] + sizes[1]], axis=-1)
        else:
            query, key = project("query", h[:, reads:], c.heads, "heads", salt), project("key", h, c.kv_heads, "kv_heads", salt + 1)
            value = project("value", h, c.kv_heads, "kv_heads", salt + 2)
        if c.qk_norm == "full":
            query, key = Norm(c, name="query_norm")(query), Norm(c, name="key_norm")(key)
        query = query.reshape(batch, -1, c.heads, c.head_dim)
        key, value = (y.reshape(batch, -1, c.kv_heads, c.head_dim) for y in (key, value))
        if c.qk_norm == "head":
            query, key = Norm(c, name="query_norm")(query), Norm(c, name="key_norm")(key)
        if tables:
            table = tables[self.window > 0]
            query, key = rope.rotate(query, jax.tree.map(lambda y: y[:, reads:], table)), rope.rotate(key, table)
        how: dict[str, float] = {"scale": c.attention_scale or c.head_dim**-0.5, "softcap": c.attention_softcap}
        if isinstance(mask, Forked):
            h = attend_forked(query, key, value, mask.reading(reads).within(reads, self.window), **how)
        elif cache is None:
            assert isinstance(mask, Rows)
            h = attend_rows(query, key, value, mask.segment_ids, window=self.window, **how)
        else:
            h, cache = kv.attend(cache, query, key, value, mask, slot, self.window, **how)
        h = h.reshape(batch, -1, c.heads * c.head_dim)
        return Linear(c, c.hidden, ("heads", "embed"), (2 * c.layers) ** -0.5, c.output_bias, name="output")(h, keys, salt + 3), cache

    def _feed_forward(self, h: Array, *, keys: Array | None, index: Array | int) -> tuple[Array, Choices | None]:
        c = self.config
        if self.experts:
            plain = dataclasses.replace(c, lora=None, quantise="none")
            logits = Linear(plain, c.experts, ("embed", None), name="router")(h)
            weights, experts, probabilities = moe.route(logits.reshape(-1, c.experts), c.experts_per_token, c.renormalise)
            weights, experts, probabilities = (y.reshape(*h.shape[:-1], -1) for y in (weights, experts, probabilities))
            chosen = jax.nn.one_hot(experts, c.experts, dtype=jnp.float32).sum(-2)
            return moe.Experts(c, name="experts")(h, weights, experts), (chosen, probabilities)
        salt = DROPOUTS * index + 4
        project = lambda name, salt: Linear(c, c.mlp, ("embed", "mlp"), bias=c.mlp_bias, name=name)(h, keys, salt)  # noqa: E731
        act = ACTIVATIONS[c.activation]
        if self.has_variable("params", "gate_up"):  # layout.joined
            gate, up = jnp.split(Linear(c, 2 * c.mlp, ("embed", None), bias=c.mlp_bias, name="gate_up")(h), 2, axis=-1)
            inner = act(gate) * up
        else:
            inner = act(project("gate", salt)) * project("up", salt + 1) if c.gated else act(project("up", salt + 1))
        return Linear(c, c.hidden, ("mlp", "embed"), (2 * c.layers) ** -0.5, c.mlp_bias, name="down")(inner, keys, salt + 2), None
