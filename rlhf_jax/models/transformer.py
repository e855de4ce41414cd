"""One decoder-only transformer in Flax Linen, used through pure functions on plain dict trees.

`init` draws the parameters, `trunk` maps tokens to hidden states, `cached` does the same with an explicit KV cache, and `unembed` maps hidden states
to logits. Attention sees earlier tokens of the same segment only (law 2); a pad is never attended. A family (models/families) is a choice of
ModelConfig's fields. Deviation: kernels are drawn fan-in scaled and residual outputs by a further 1/√(2·layers), so that models of 0.1 M parameters
train from scratch.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.models import layout, moe, rope
from rlhf_jax.models.attention import Mask, forked
from rlhf_jax.models.blocks import Block, Choices
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.cache import empty as empty_cache  # noqa: F401  asked for here, beside `cached`
from rlhf_jax.models.causal import Rows
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layers import Norm, drop, logical, perturb, pin
from rlhf_jax.ops import partition
from rlhf_jax.ops.partition import constrain
from rlhf_jax.types import Array, PyTree

RESIDUAL = "residual"  # the stream between layers


class Ends(nn.Module):
    """Everything outside the layers: embedding table, final norm, and the heads this network has."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        table = lambda name, rows, axis: self.param(  # noqa: E731
            name, logical(nn.initializers.normal(c.hidden**-0.5), axis, "embed"), (rows, c.hidden), dtype
        )
        self.embedding = table("embedding", c.vocab_size, "vocab")
        if c.position == "learned":
            self.positions = table("positions", c.positions, None)
        self.norm = Norm(c)
        if "lm" in c.outputs and not c.tied:
            self.lm_head = self.param("lm_head", logical(nn.initializers.normal(c.hidden**-0.5), "embed", "vocab"), (c.hidden, c.vocab_size), dtype)
        # A reward head starts at std 1/√(d+1) (Stiennon et al. 2020), a value head at V = 0.
        if "score" in c.outputs:
            self.score_head = Scalar((c.hidden + 1) ** -0.5, bias=False, param_dtype=dtype)
        if "value" in c.outputs:
            self.value_head = Scalar(0.0, bias=True, param_dtype=dtype)

    def embed(self, tokens: Array, positions: Array) -> Array:
        """Every device looks its features of all tokens up: an all-to-all of activations, in the place of gathering a table that is larger, and of a
        sum of its gradient over all devices."""
        c, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        slots = partition.even("length", tokens.shape[1])
        x = constrain(self.embedding, (None, "embed"))[constrain(tokens, ("beside_fsdp", slots))].astype(dtype)
        x = constrain(x, ("beside_fsdp", slots, "embed"))
        if c.scaled_embedding:
            x = x * jnp.asarray(c.hidden**0.5, dtype)
        if c.position == "learned":
            x = x + constrain(self.positions, (None, None))[positions].astype(dtype)
        return pin(x)

    def finish(self, x: Array) -> Array:
        return self.norm(x)

    def unembed(self, hidden: Array) -> Array:
        c, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        matrix = self.embedding.T if c.tied else self.lm_head
        logits = jnp.matmul(hidden.astype(dtype), matrix.astype(dtype), preferred_element_type=jnp.float32)
        return c.logits_softcap * jnp.tanh(logits / c.logits_softcap) if c.logits_softcap else logits

    def scalar(self, hidden: Array, head: str) -> Array:
        return getattr(self, f"{head}_head")(hidden.astype(jnp.float32))

    def __call__(self, tokens: Array) -> Array:
        """Touches every parameter, for init."""
        h = self.finish(self.embed(tokens, jnp.zeros_like(tokens)))
        outs = [self.unembed(h).sum()] if "lm" in self.config.outputs else []
        return sum(outs + [self.scalar(h, head).sum() for head in ("score", "value") if head in self.config.outputs], jnp.float32(0))


class Scalar(nn.Module):
    """A linear head of one output, in float32: [..., D] → [...]."""

    std: float
    bias: bool
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.normal(self.std) if self.std else nn.initializers.zeros
        kernel = self.param("kernel", logical(init, "embed", None), (x.shape[-1], 1), self.param_dtype)
        y = (x @ kernel.astype(x.dtype))[..., 0]
        return y + self.param("bias", logical(nn.initializers.zeros, None), (1,), self.param_dtype).astype(x.dtype)[0] if self.bias else y


def _ends(config: ModelConfig, params: PyTree, method: str, *args: Any) -> Any:
    return Ends(config).apply({"params": params["ends"]}, *args, method=method)


def _block(config: ModelConfig, layer: int) -> Block:
    window, experts = config.kind(layer)
    return Block(config, window, experts)


def _boxed(config: ModelConfig, key: Array) -> PyTree:
    tokens = jnp.zeros((1, 2), jnp.int32)
    x, tables = jnp.zeros((1, 2, config.hidden), jnp.dtype(config.compute_dtype)), rope.tables(config, tokens)
    layers = {
        str(i): _block(config, i).init(jax.random.fold_in(key, i + 1), x, tables, Rows(tokens + 1))["params"] for i in range(config.layers)
    }
    return {"ends": Ends(config).init(jax.random.fold_in(key, 0), tokens)["params"], "layers": layers}


def init(config: ModelConfig, key: Array) -> PyTree:
    """Fresh parameters in the layout of `config.unit`. Layer i's draw depends on (key, i) alone.

    Args:
      config: the network.
      key: typed key, [].
    """
    chex.assert_rank(key, 0)
    return layout.to_runtime(meta.unbox(_boxed(config, key)), config.unit)


def logical_axes(config: ModelConfig) -> PyTree:
    """The parameters' tree with a tuple of logical axis names at each leaf."""
    boxed = jax.eval_shape(functools.partial(_boxed, config), jax.random.key(0))
    names = jax.tree.map(lambda b: layout.Axes(b.names), boxed, is_leaf=lambda b: isinstance(b, meta.AxisMetadata))
    return layout.axes_to_runtime(names, config.unit)


def _kept(remat: str) -> Any:
    """What jax.checkpoint keeps of a layer besides its input: nothing, or the results of its projections. "offload" keeps the input too off the
    device, so that of B·T·D numbers per layer none wait there for the backward pass; they cross to the host's memory and back once."""
    policies = jax.checkpoint_policies
    if remat == "offload":
        return policies.save_and_offload_only_these_names(names_which_can_be_saved=[], names_which_can_be_offloaded=[RESIDUAL], offload_src="device",
                                                          offload_dst="pinned_host")
    return policies.dots_with_no_batch_dims_saveable if remat == "dots" else None


def _layers(config: ModelConfig, params: PyTree, x: Array, tables: Any, mask: Mask | Rows, keys: Array | None, cache: Cache | None,
            slot: Array | int | None, reads: int = 0) -> tuple[Array, Cache | None, list[Choices]]:
    """The stack of blocks: whole units scanned, the rest unrolled; the cache goes along as scan inputs and outputs. What comes out begins at slot
    `reads`."""

    def apply(kind: int, reads: int, x: Array, layer: PyTree, index: Array | int, cache: Cache | None) -> tuple[Array, Cache | None, Choices | None]:
        x = checkpoint_name(x, RESIDUAL)
        out: Any = _block(config, kind).apply({"params": layer}, x, tables, mask, keys, index, cache, slot, reads)
        return out

    if config.remat != "none":
        apply = jax.checkpoint(apply, static_argnums=(0, 1), policy=_kept(config.remat))

    layers, unit = params["layers"], config.unit
    new_cache: dict[str, Any] = {}
    choices: list[Choices] = []

    def body(x: Array, inputs: Any) -> tuple[Array, Any]:
        stacked, repeat, caches = inputs
        out: dict[str, Any] = {}
        for kind, name in enumerate(layout.unit_names(unit)):
            x, *out[name] = apply(kind, 0, x, stacked[name], repeat * unit + kind, None if caches is None else caches[name])
        return x, out

    if unit:
        repeats = config.layers // unit
        caches = None if cache is None else cache[layout.SCAN]
        x, out = jax.lax.scan(body, x, (layers[layout.SCAN], jnp.arange(repeats), caches))
        new_cache[layout.SCAN] = {name: kept for name, (kept, _) in out.items()}
        choices += [jax.tree.map(lambda y, r=r: y[r], chosen) for _, chosen in out.values() if chosen is not None for r in range(repeats)]
    unrolled = range(config.layers - config.layers % unit if unit else 0, config.layers)
    for i in unrolled:
        x, new_cache[str(i)], chosen = apply(i, reads if i == unrolled[-1] else 0, x, layers[str(i)], i, None if cache is None else cache[str(i)])
        choices += [] if chosen is None else [chosen]
    return x if unrolled else x[:, reads:], None if cache is None else new_cache, choices


def trunk(config: ModelConfig, params: PyTree, tokens: Array, positions: Array, segment_ids: Array, keys: Array | None = None,
          noise: float = 0.0) -> Array:
    """Final hidden states, [B, T, D].

    Args:
      config: the network.
      params: its parameters.
      tokens, positions, segment_ids: [B, T] int32.
      keys: [B] typed keys for dropout and noise, or None.
      noise: α of `perturb`, which comes before dropout.
    """
    chex.assert_rank([tokens, positions, segment_ids], 2)
    return balanced_trunk(config, params, tokens, positions, segment_ids, keys, noise)[0]


def balanced_trunk(config: ModelConfig, params: PyTree, tokens: Array, positions: Array, segment_ids: Array, keys: Array | None = None,
                   noise: float = 0.0) -> tuple[Array, Array]:
    """As `trunk`, and every sequence's balance loss, the mean over layers, spread over its tokens: [B, T] float32, zero without experts."""
    chex.assert_rank([tokens, positions, segment_ids], 2)
    chex.assert_equal_shape([tokens, positions, segment_ids])
    x = perturb(_ends(config, params, "embed", tokens, positions), segment_ids, keys, noise)
    x = drop(x, keys, 0, config.dropout)
    x, _, choices = _layers(config, params, x, rope.tables(config, positions), Rows(segment_ids), keys, None, 0)
    losses = [moe.balance(*chosen, segment_ids) for chosen in choices]
    return pin(_ends(config, params, "finish", x)), sum(losses, jnp.zeros(tokens.shape, jnp.float32)) / max(len(losses), 1)


def forked_trunk(config: ModelConfig, params: PyTree, tokens: Array, positions: Array, segment_ids: Array, prefix: tuple[int, int]) -> Array:
    """`trunk` without dropout where each G neighbours share their first P slots, which are computed once for the G, gradient included.

    Args:
      config: the network; without experts, whose balance counts tokens.
      params: its parameters.
      tokens, positions, segment_ids: [B, T] int32.
      prefix: (G, P), as in types.Sequences.

    Returns:
      [B, T, D]: zero before slot P − 1; NaN in rows whose first P slots are not those of their group.
    """
    chex.assert_rank([tokens, positions, segment_ids], 2)
    chex.assert_equal_shape([tokens, positions, segment_ids])
    (rows, width), (group, prompt) = tokens.shape, prefix
    reads = prompt - 1

    def fold(x: Array) -> Array:
        x = x.reshape(-1, group, width)
        return jnp.concatenate([x[:, 0, :prompt], x[:, :, prompt:].reshape(x.shape[0], -1)], axis=1)

    x, at = _ends(config, params, "embed", fold(tokens), fold(positions)), fold(positions)
    x, _, _ = _layers(config, params, x, rope.tables(config, at), forked(segment_ids, prefix), None, None, 0, reads)
    x = pin(_ends(config, params, "finish", x))
    last = jnp.broadcast_to(x[:, None, :1], (x.shape[0], group, 1, x.shape[-1])).reshape(rows, 1, -1)
    x = jnp.concatenate([jnp.zeros((rows, reads, x.shape[-1]), x.dtype), last, x[:, 1:].reshape(rows, width - prompt, -1)], axis=1)
    same = jnp.ones((rows // group, group), bool)
    for leaf in (tokens, positions, segment_ids):
        first = leaf.reshape(-1, group, width)[:, :, :prompt]
        same &= (first == first[:, :1]).all(-1)
    return jnp.where(same.reshape(rows, 1, 1), x, jnp.nan)


def unembed(config: ModelConfig, params: PyTree, hidden: Array) -> Array:
    """Logits [..., V] float32.

    Args:
      config: the network.
      params: its parameters.
      hidden: [..., D] final hidden states.
    """
    chex.assert_axis_dimension(hidden, -1, config.hidden)
    return _ends(config, params, "unembed", hidden)


def by_vocabulary(config: ModelConfig, params: PyTree, positions: int) -> tuple[PyTree, bool]:
    """The parameters with the output matrix split over the vocabulary on all devices that share rows' parameters, and whether it is: logits are made
    where their column lies, from hidden states that are gathered, and only sums over the vocabulary travel.

    Args:
      config: the network.
      params: its parameters.
      positions: hidden states that one group of such devices reads; more of them than columns, and the matrix is gathered instead.
    """
    chex.assert_rank(params["ends"]["embedding"], 2)
    read = positions // partition.size("beside_fsdp")
    if partition.size("embed") == 1 or config.vocab_size % partition.size("vocab_fsdp") or read > config.vocab_size:
        return params, False
    name, axes = ("embedding", ("vocab_fsdp", None)) if config.tied else ("lm_head", (None, "vocab_fsdp"))
    return {**params, "ends": {**params["ends"], name: constrain(params["ends"][name], axes)}}, True


def scalar(config: ModelConfig, params: PyTree, hidden: Array, head: str) -> Array:
    """A scalar head's reading of each hidden state, [...] float32.

    Args:
      config: the network.
      params: its parameters.
      hidden: [..., D].
      head: "value" or "score".
    """
    chex.assert_axis_dimension(hidden, -1, config.hidden)
    return _ends(config, params, "scalar", hidden, head)


def cached(config: ModelConfig, params: PyTree, tokens: Array, positions: Array, mask: Array | Rows, cache: Cache, slot: Array | int | None
           ) -> tuple[Array, Cache]:
    """Hidden states of `tokens`, written into the cache at times `slot … slot + T − 1` (models/cache.py); the rest as `trunk`.

    Args:
      config: the network.
      params: its parameters.
      tokens, positions: [B, T] int32; T = prompt for prefill, 1 for a decode step.
      mask: [B, T, S] bool, which of the S times each query may see; Rows without a slot.
      cache: as from `empty_cache`.
      slot: [] int32, the time of the first token; None: the rows begin with it, the cache is empty.

    Returns:
      hidden [B, T, D] and the new cache.
    """
    chex.assert_rank([tokens, positions], 2)
    chex.assert_equal_shape([tokens, positions])
    if not isinstance(mask, Rows):
        chex.assert_rank(mask, 3)
    x = _ends(config, params, "embed", tokens, positions)
    x, cache, _ = _layers(config, params, x, rope.tables(config, positions), mask, None, cache, slot)
    return _ends(config, params, "finish", x), cache
