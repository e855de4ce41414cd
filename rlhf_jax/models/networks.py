"""`nets`: what an objective sees of the models. One method per network, one alignment of everything that they return.

`Networks(params, frozen, spec)` is a pytree; `params` is what trains, `frozen` what does not, `spec` the static rest. The step
differentiates `nets.replace(params=p)`. Methods merge trained and frozen leaves themselves and accept [B, T] or [B, K, T]. The head runs in
chunks of positions, so that no [B, T, V] array exists, and only at `loss_positions` when a batch names them.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.errors import UserError
from rlhf_jax.models import layout, lora, transformer
from rlhf_jax.models.causal import Rows
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layers import pin
from rlhf_jax.models.passes import Passes
from rlhf_jax.ops import masking, partition, rows, vocab
from rlhf_jax.ops.backends import JOINED_BELOW, UNROLLING, platform
from rlhf_jax.ops.partition import constrain
from rlhf_jax.types import Array, Mean, PyTree, Sequences

VocabFunction = Callable[..., Array]
Want = tuple[str | VocabFunction, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Architectures, and the temperature that divides every policy's and reference's logits."""

    policy: ModelConfig | None = None
    ref: ModelConfig | None = None  # None: the policy's
    critic: ModelConfig | None = None  # None: a value head on the policy's own trunk
    reward: ModelConfig | None = None
    temperature: float = 1.0
    cache: str = "same"  # precision of the sampler's keys and values, one of models.cache.KINDS


def merge(first: PyTree, second: PyTree | None) -> PyTree:
    """One tree of both dict trees' leaves; `first` wins where both have one."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return first
    return {key: merge(first[key], second.get(key)) if key in first else second[key] for key in {**second, **first}}


class Networks(struct.PyTreeNode):
    """Trained and frozen networks behind one method each."""

    params: PyTree  # {"policy": …, "critic": …, "reward": …}, those that train
    frozen: PyTree  # {"base": partial trees that `params` completes, "ref": …, "reward": …}
    spec: NetworkSpec = struct.field(pytree_node=False)
    row_chunks: int = struct.field(pytree_node=False, default=1)  # forwards of `prepare` run in this many strided row chunks
    passes: Passes | None = struct.field(pytree_node=False, default=None)  # of trunks that `prepare` and `loss` share (train.step)
    tally: list[Mean] | None = struct.field(pytree_node=False, default=None)  # where the trained networks' balance losses go, in a loss (train.step)

    def _tree(self, name: str) -> PyTree:
        base = self.frozen.get("base", {}).get(name)
        if name in self.params:
            return merge(self.params[name], base)
        if name in self.frozen:
            return self.frozen[name]
        if base is None:
            raise ValueError(f"this run has no {name} network: neither trained nor frozen ({', '.join({**self.params, **self.frozen})})")
        return base

    def _network(self, name: str) -> tuple[ModelConfig, PyTree]:
        """Configuration and parameters of a network; a reference without a configuration of its own shares what the policy does not train."""
        if name == "ref" and self.spec.ref is None:
            if "ref" not in self.frozen:
                raise UserError("config.reference_from names no network, or log-probs alone, and the objective asks the reference itself: name a run")
            config, own = _config(self.spec.policy, "ref"), self.frozen["ref"]
            if not lora.has_adapters(own):  # fresh adapters change nothing: without them the base is the initial policy
                config = dataclasses.replace(config, lora=None)
            return config, merge(own, self.frozen.get("base", {}).get("policy"))
        return _config(getattr(self.spec, name), name), self._tree(name)

    @property
    def temperature(self) -> float:
        """What divides the policy's and the reference's logits."""
        return self.spec.temperature

    def has(self, name: str) -> bool:
        """Whether there is such a network: "policy", "ref", "critic" or "reward"."""
        return name in self.params or name in self.frozen or name in self.frozen.get("base", {})

    def policy(self, seqs: Sequences, keys: Array | None = None, want: Want = (vocab.logps,), along: Mapping[str, Array] | None = None,
               noise: float = 0.0) -> Any:
        """The policy's reading of `seqs`; with "values" in `want`, also the critic's.

        Args:
          seqs: [B, T] or [B, K, T].
          keys: [B] typed keys for dropout and noise, or None for neither.
          want: "values" (V before each token), "scores" (read after each token), "hidden", or functions `(logits, target, **along)`.
          along: further arrays [B, T, …] that the functions get chunk by chunk.
          noise: NEFTune's α, of uniform noise on the policy's embeddings; 0 = none.

        Returns:
          A namespace with one attribute per entry of `want`, each [B, T] ([B, K, T]), law 1's alignment, float32 nats.
        """
        chex.assert_rank(seqs.tokens, {2, 3})
        separate = "values" in want and self.spec.critic is not None
        if "values" in want and not separate and "value" not in _config(self.spec.policy, "policy").outputs:
            raise UserError("config.critic.kind = 'none', and the objective needs values: choose 'separate' or 'shared'")
        mine = tuple(w for w in want if not (separate and w == "values"))
        out = {}
        if mine:
            config = _config(self.spec.policy, "policy")
            out = self._run(config, self._tree("policy"), seqs, keys, mine, along, noise, "policy")
        if separate:
            out |= self._run(_config(self.spec.critic, "critic"), self._tree("critic"), seqs, keys, ("values",), None, name="critic")
        return types.SimpleNamespace(**out)

    def ref(self, seqs: Sequences, want: Want = (vocab.logps,)) -> Any:
        """The reference policy's reading; never trained, never dropped out. As `policy`."""
        chex.assert_rank(seqs.tokens, {2, 3})
        config, tree = self._network("ref")
        return types.SimpleNamespace(**jax.lax.stop_gradient(self._run(config, tree, seqs, None, want, None)))

    def reward(self, seqs: Sequences, keys: Array | None = None) -> Any:
        """`.scores`, a reward model's reading after each token, [B, T] or [B, K, T]; `masking.at_last_real` picks the row's score."""
        chex.assert_rank(seqs.tokens, {2, 3})
        out = self._run(_config(self.spec.reward, "reward"), self._tree("reward"), seqs, keys, ("scores",), None, name="reward")
        return types.SimpleNamespace(**out)

    def as_reference(self) -> Networks:
        """The frozen reference in the policy's place: what it draws is drawn by these.

        Raises:
          UserError: its vocabulary is larger than the policy's, which could not read its samples.
        """
        config, tree = self._network("ref")
        own = _config(self.spec.policy, "policy")
        if config.vocab_size > own.vocab_size:
            raise UserError(f"config.reference_from: the reference's vocabulary of {config.vocab_size} entries exceeds config.model.vocab_size = "
                            f"{own.vocab_size}: the policy could not read what it draws")
        spec = dataclasses.replace(self.spec, policy=config, ref=None)
        return self.replace(params={"policy": tree}, frozen={}, spec=spec)

    def unembed(self, name: str, hidden: Array) -> Array:
        """The logits that a network's hidden states give, divided by the temperature: for a vocabulary function that reads two networks.

        Args:
          name: "policy" or "ref".
          hidden: [..., D], from `want=("hidden",)`; the hidden state of t − 1 predicts token t.

        Returns:
          [..., V] float32.
        """
        chex.assert_type(hidden, float)
        config, tree = self._network(name)
        return transformer.unembed(config, tree, hidden) / self.spec.temperature

    def decoding(self) -> Networks:
        """The policy alone, laid out for `prefill` and `decode`: where unrolling wins, without the layer scan, whose cache is rewritten whole for
        every token, and with small kernels joined. Called once, outside the loop, so that the parameters are laid out once."""
        config = _config(self.spec.policy, "policy")
        if platform() not in UNROLLING:
            return self
        params = layout.to_canonical(self._tree("policy"))
        if config.lora is None and config.quantise == "none":
            params = layout.joined(params, JOINED_BELOW)
        spec = dataclasses.replace(self.spec, policy=dataclasses.replace(config, scan_layers=False))
        return self.replace(params={"policy": params}, frozen={}, spec=spec)

    def prefill(self, tokens: Array, positions: Array, segment_ids: Array, slots: int) -> tuple[Array, Any]:
        """Logits after the last prompt slot and a cache of `slots` slots (layers with a window: no more than it) that holds the prompts.

        Args:
          tokens, positions, segment_ids: [B, P] int32, padded on the left.
          slots: size of the cache, ≥ P.

        Returns:
          logits [B, V] float32, not divided by a temperature; the cache.
        """
        chex.assert_rank([tokens, positions, segment_ids], 2)
        chex.assert_equal_shape([tokens, positions, segment_ids])
        config, params = _config(self.spec.policy, "policy"), self._tree("policy")
        cache = transformer.empty_cache(config, tokens.shape[0], slots, kind=self.spec.cache, ring=True)
        hidden, cache = transformer.cached(config, params, tokens, positions, Rows(segment_ids), cache, None)
        return transformer.unembed(config, params, hidden[:, -1]), cache

    def decode(self, token: Array, position: Array, slot: Array, visible: Array, cache: Any) -> tuple[Array, Any]:
        """Logits after one more token per row.

        Args:
          token, position: [B] int32.
          slot: [] int32, the time of the tokens, the same in every row; they take the cache's slot of this time mod S.
          visible: [B, S] bool, the slots each row may see, its own new one included.
          cache: from `prefill` or `decode`.

        Returns:
          logits [B, V] float32 and the cache.
        """
        chex.assert_rank([token, position], 1)
        chex.assert_equal_shape([token, position])
        config, params = _config(self.spec.policy, "policy"), self._tree("policy")
        hidden, cache = transformer.cached(config, params, token[:, None], position[:, None], visible[:, None, :], cache, slot)
        return transformer.unembed(config, params, hidden[:, 0]), cache

    def _run(self, config: ModelConfig, params: PyTree, seqs: Sequences, keys: Array | None, want: Want, along: Any, noise: float = 0.0,
             name: str = "ref") -> dict[str, Array]:
        """Folds branches into rows, runs the forward in row chunks when asked to, and unfolds."""
        lead = seqs.tokens.shape[:-1]
        if len(lead) == 2:
            fold = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
            seqs, along = jax.tree.map(fold, (seqs, along))
            if keys is not None:
                keys = jax.vmap(lambda k: jax.vmap(jax.random.fold_in, (None, 0))(k, jnp.arange(lead[1])))(keys).reshape(-1)

        def forward(batch: Any, hidden: Array | None = None) -> dict[str, Array]:
            return _forward(config, params, *batch, want=want, temperature=self.spec.temperature, noise=noise, balance=balance, hidden=hidden)

        alike = _alike(config, keys, noise)
        if len(lead) == 2 or not alike:
            seqs = seqs.replace(prefix=None)
        batch: Any = (seqs, keys, along)
        chunks = self.row_chunks
        balance = self.tally is not None and config.experts > 0 and config.balance_coef > 0 and name in self.params
        if chunks > 1 and lead[0] % chunks == 0:
            batch = rows.divisible(batch, chunks)
            out = rows.joined(jax.lax.map(forward, rows.interleave(batch, chunks)), rows.group_size(batch))
        elif self.passes is not None and len(lead) == 1 and alike and name in self.params:
            base = self.frozen.get("base", {}).get(name)
            out = forward(batch, self.passes.hidden(name, self.params[name], seqs.tokens, lambda own: _hidden(config, merge(own, base), seqs)))
        else:
            out = forward(batch)
        if balance:
            assert self.tally is not None
            sequences = (masking.segment_starts(seqs.segment_ids) & (seqs.segment_ids != 0)).sum()
            self.tally.append(Mean(config.balance_coef * out.pop("balance").sum(), sequences.astype(jnp.float32)))
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)


def _config(config: ModelConfig | None, name: str) -> ModelConfig:
    if config is None:
        key = {"policy": "config.network", "reward": "config.network or config.reward_from"}.get(name, "config.reference_from")
        raise UserError(f"the objective needs a {name} network, which this run does not have: look at {key}")
    return config


def _alike(config: ModelConfig, keys: Array | None, noise: float) -> bool:
    """Whether a pass depends on the tokens alone, so that a prompt may be computed once for several rows: nothing is drawn or counted per row."""
    adapters = config.lora.dropout if config.lora is not None else 0.0
    return not config.experts and not noise and (keys is None or not (config.dropout or adapters))


def _forward(config: ModelConfig, params: PyTree, seqs: Sequences, keys: Array | None, along: Any, *, want: Want, temperature: float,
             noise: float, balance: bool, hidden: Array | None) -> dict[str, Array]:
    """One pass of the trunk unless it is there, one chunked pass of the head, law 1's alignment. All arrays [B, T]."""
    starts = masking.segment_starts(seqs.segment_ids)
    out: dict[str, Array] = {}
    if balance:
        hidden, out["balance"] = transformer.balanced_trunk(config, params, seqs.tokens, seqs.positions, seqs.segment_ids, keys, noise)
    elif hidden is None:
        hidden = _hidden(config, params, seqs, keys, noise)
    if "hidden" in want:
        out["hidden"] = hidden
    if "scores" in want:
        out["scores"] = jnp.where(seqs.segment_ids != 0, transformer.scalar(config, params, hidden, "score"), 0.0)
    if "values" in want:
        after = transformer.scalar(config, params, hidden, "value")
        out["values"] = jnp.where(starts, 0.0, _shift(after))
    functions = tuple(w for w in want if not isinstance(w, str))
    if functions:
        out |= _head(config, params, hidden, seqs, starts, functions, along or {}, temperature)
    return out


def _hidden(config: ModelConfig, params: PyTree, seqs: Sequences, keys: Array | None = None, noise: float = 0.0) -> Array:
    """[B, T, D]; a prompt that neighbours share is computed once, unless the slots of a row are spread over devices."""
    read = (seqs.tokens, seqs.positions, seqs.segment_ids)
    if seqs.prefix is not None and partition.size("length") == 1:
        return transformer.forked_trunk(config, params, *read, seqs.prefix)
    return transformer.trunk(config, params, *read, keys, noise)


def _shift(x: Array) -> Array:
    """What was at t − 1 comes to t; slot 0 gets its own, which is masked."""
    return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)


def _head(config: ModelConfig, params: PyTree, hidden: Array, seqs: Sequences, starts: Array, functions: tuple[VocabFunction, ...],
          along: Mapping[str, Array], temperature: float) -> dict[str, Array]:
    """The functions of the logits at `loss_positions` (everywhere if None), scattered back to [B, T], zero elsewhere."""
    at = seqs.loss_positions
    if at is None:
        before, target, extra = _shift(hidden), seqs.tokens, dict(along)
    else:
        pick = lambda x, index: jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)  # noqa: E731
        before, target = pin(pick(hidden, jnp.maximum(at - 1, 0))), pick(seqs.tokens, at)
        extra = {name: pick(x, at) for name, x in along.items()}
    values = _chunked(config, params, before, target, extra, functions, temperature)
    if at is not None:
        rows = jnp.arange(at.shape[0])[:, None]
        # Padding positions are 0, a segment start, where law 1 wants a zero whichever write wins.
        values = {name: jnp.zeros(seqs.tokens.shape, x.dtype).at[rows, at].set(x) for name, x in values.items()}
    return {name: jnp.where(starts, 0.0, x) for name, x in values.items()}


def _chunked(config: ModelConfig, params: PyTree, hidden: Array, target: Array, extra: Mapping[str, Array],
             functions: tuple[VocabFunction, ...], temperature: float) -> dict[str, Array]:
    """`functions` of the logits, [B, R] each, `logits_chunk` positions at a time and recomputed in the backward pass. Where positions are spread over
    devices, a chunk takes as many of each."""

    (batch, length), size = target.shape, config.logits_chunk
    spread = partition.size("length")
    spread = 1 if length % spread else spread
    params, split_head = transformer.by_vocabulary(config, params, target.size)
    slots = "length" if spread > 1 else None

    def evaluate(chunk: Any) -> dict[str, Array]:
        h, t, along = chunk
        if split_head:
            h, t = constrain(h, ("beside_fsdp", slots, None)), constrain(t, ("beside_fsdp", slots))
        logits = transformer.unembed(config, params, h)
        if split_head:
            logits = constrain(logits, ("beside_fsdp", slots, "vocab_fsdp"))
        if temperature != 1.0:
            logits = logits / temperature
        out = {f.__name__: f(logits, t, **along) for f in functions}
        return {name: constrain(x, ("batch", slots)) for name, x in out.items()}

    if size == 0 or length <= size:
        return evaluate((hidden, target, extra))
    own = length // spread
    part = min(-(-size // spread), own)  # of a chunk's positions, on one device
    count = -(-own // part)

    def split(x: Array) -> Array:
        x = x.reshape(batch, spread, own, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, count * part - own)) + ((0, 0),) * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(batch, spread, count, part, *x.shape[3:]), 2, 0).reshape(count, batch, spread * part, *x.shape[3:])

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(count, batch, spread, part), 0, 2).reshape(batch, spread, count * part)
        return x[:, :, :own].reshape(batch, length)

    out = jax.lax.map(jax.checkpoint(evaluate), jax.tree.map(split, (hidden, target, dict(extra))))
    return {name: joined(x) for name, x in out.items()}
