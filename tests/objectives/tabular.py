"""A fake `nets` whose parameters are tables, small enough for finite differences, enumeration and an overfit in seconds.

    policy  logits [V, V] by the token before        critic  V [V] by the token before        reward  [V], summed over the row so far

It keeps law 1's alignment and honours `loss_positions`, `want`, `along` and the temperature, like the real one.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlhf_jax.models import layers
from rlhf_jax.ops import masking, vocab
from rlhf_jax.types import Array, Comparisons, Labelled, Mean, Rollout, Sequences, Unpaired


@struct.dataclass
class TabularNets:
    """`params` holds any of policy, critic and reward; `frozen` may hold ref."""

    params: dict[str, Array]
    frozen: dict[str, Array]
    temperature: float = struct.field(pytree_node=False, default=1.0)
    calls: list[Any] | None = struct.field(pytree_node=False, default=None)  # what `policy` was asked for, when a test wants to know

    def policy(self, seqs: Sequences, keys: Array | None = None, want: tuple[Any, ...] = (vocab.logps,), along: Any = None,
               noise: float = 0.0) -> Any:
        if self.calls is not None:
            self.calls.append(want)
        return self._read(self.params["policy"], seqs, want, along, keys if noise else None, noise)

    def ref(self, seqs: Sequences, want: tuple[Any, ...] = (vocab.logps,)) -> Any:
        return self._read(self.frozen["ref"], seqs, want)

    def reward(self, seqs: Sequences, keys: Array | None = None) -> Any:
        scores = jnp.cumsum(jnp.where(seqs.segment_ids != 0, self.params["reward"][seqs.tokens], 0.0), axis=-1)
        return types.SimpleNamespace(scores=jnp.where(seqs.segment_ids != 0, scores, 0.0))

    def unembed(self, name: str, hidden: Array) -> Array:
        """A table's hidden states are its logits."""
        return hidden / self.temperature

    def _read(self, table: Array, seqs: Sequences, want: tuple[Any, ...], along: Any = None, keys: Array | None = None, noise: float = 0.0
              ) -> Any:
        before = jnp.concatenate([seqs.tokens[..., :1], seqs.tokens[..., :-1]], axis=-1)
        logits = table[before]
        if keys is not None:  # a table's embeddings are its logits
            logits = layers.perturb(logits, seqs.segment_ids, keys, noise)
        starts = masking.segment_starts(seqs.segment_ids)
        headless = starts
        if seqs.loss_positions is not None:
            chosen = jax.nn.one_hot(seqs.loss_positions, seqs.tokens.shape[-1]).any(-2)
            headless = starts | ~chosen
        out = {f.__name__: jnp.where(headless, 0.0, f(logits / self.temperature, seqs.tokens, **(along or {})))
               for f in want if callable(f)}
        if "hidden" in want:
            out["hidden"] = table[seqs.tokens]
        if "values" in want:
            out["values"] = jnp.where(starts, 0.0, self.params["critic"][before])
        return types.SimpleNamespace(**out)


def nets(rng: np.random.Generator, vocabulary: int, *, moved: float = 0.5) -> TabularNets:
    """Random tables; the reference differs from the policy by noise of size `moved` (0: the two are equal)."""
    policy = rng.normal(size=(vocabulary, vocabulary)).astype(np.float32)
    noise = rng.normal(size=policy.shape).astype(np.float32)
    tables = {"policy": policy, "critic": rng.normal(size=vocabulary), "reward": rng.normal(size=vocabulary)}
    return TabularNets({k: jnp.asarray(v, jnp.float32) for k, v in tables.items()}, {"ref": jnp.asarray(policy + moved * noise)})


def sequences(
    rng: np.random.Generator, shape: tuple[int, ...], vocabulary: int, *, filler: bool = False, packed: bool = False
) -> Sequences:
    """Rows with padding on both sides, a prompt and a response with a gap in it; the last row is filler if asked.

    Row 0 keeps a single loss token. Tokens on padding are random: nothing may read them. `loss_mask` is true on filler, on purpose.
    """
    length = shape[-1]
    tokens = rng.integers(0, vocabulary, shape)
    segments, wanted = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for number, index in enumerate(np.ndindex(*shape[:-1])):
        left, right = rng.integers(0, 2), length - rng.integers(0, 3)
        segments[index][left:right] = 1
        middle = rng.integers(left + 1, right - 1)
        wanted[index][middle:right] = rng.random(right - middle) < 0.8
        wanted[index][right - 1] = True
        if packed and right - middle > 2:
            segments[index][middle:right] = 2
        if number == 0:
            wanted[index] = False
            wanted[index][right - 1] = True
    if filler:
        segments[-1], wanted[-1] = 0, True
    positions = np.maximum(np.cumsum(segments != 0, -1) - 1, 0)
    tokens, positions, segments = (jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments))
    return Sequences(tokens=tokens, positions=positions, segment_ids=segments, loss_mask=jnp.asarray(wanted))


@jax.jit
def with_reference(fake: TabularNets, batch: Any) -> Any:
    """What the step does before `prepare`."""

    def fill(seqs: Sequences) -> Sequences:
        return seqs.replace(ref_logps=fake.ref(seqs).logps)

    if isinstance(batch, Sequences):
        return fill(batch)
    found = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return batch.replace(**{name: fill(value) for name, value in found.items() if isinstance(value, Sequences)})


def comparisons(
    rng: np.random.Generator, rows: int, length: int, vocabulary: int, *, filler: bool = False, margin: bool = False
) -> Comparisons:
    """Random pairs, with random margins if asked; the last is filler if asked."""
    margins = jnp.asarray(rng.random(rows), jnp.float32) if margin else None
    return Comparisons(seqs=sequences(rng, (rows, 2, length), vocabulary, filler=filler), margin=margins)


def unpaired(rng: np.random.Generator, rows: int, length: int, vocabulary: int, *, filler: bool = False) -> Unpaired:
    """Random responses, rows 0 and 1 of either kind, with random rows for the estimate of the KL; the last is filler if asked."""
    desirable = rng.random(rows) < 0.5
    desirable[:2] = True, False
    seqs, others = (sequences(rng, (rows, length), vocabulary, filler=filler) for _ in range(2))
    return Unpaired(seqs=seqs, kl_seqs=others, desirable=jnp.asarray(desirable))


def labelled(rng: np.random.Generator, rows: int, length: int, vocabulary: int, *, filler: bool = False) -> Labelled:
    """Rows with a label of 0 or 1 at some loss tokens, the weight 2 at a few; the last is filler, with labels, if asked."""
    seqs = sequences(rng, (rows, length), vocabulary, filler=filler)
    targets = jnp.asarray(rng.integers(0, 2, (rows, length)), jnp.float32)
    return Labelled(seqs=seqs, targets=targets, weights=seqs.loss_mask * jnp.asarray(rng.choice([0.0, 1.0, 2.0], (rows, length)), jnp.float32))


def rollout(rng: np.random.Generator, rows: int, length: int, vocabulary: int, *, group: int = 2, filler: bool = False) -> Rollout:
    """A rollout of random tokens and scores, with rows of a second data set beside it; row 1 is truncated."""
    seqs = sequences(rng, (rows, length), vocabulary, filler=filler)
    rolled = scored(seqs, jnp.asarray(rng.normal(size=rows), jnp.float32), group=group)
    ptx = sequences(np.random.default_rng(rows), (rows, length + 1), vocabulary, filler=filler, packed=True)
    return rolled.replace(truncated=jnp.arange(rows) == 1, ptx=ptx)


def scored(seqs: Sequences, scores: Array, *, group: int) -> Rollout:
    """A rollout of given sequences and scores, `group` neighbouring rows to a prompt."""
    index = jnp.arange(seqs.tokens.shape[0], dtype=jnp.int32)
    prompt_ids, false = index // group, jnp.zeros(index.shape, bool)
    return Rollout(seqs=seqs, sampler_logps=jnp.zeros(seqs.tokens.shape), prompt_ids=prompt_ids, sample_ids=index % group,
                   group_ids=prompt_ids, truncated=false, version=jnp.zeros_like(index), scores=scores)


def sample(fake: TabularNets, key: Array, rows: int, length: int) -> Sequences:
    """Rows that start with token 0 and go on with `length` tokens drawn from the policy."""

    def draw(token: Array, step_key: Array) -> tuple[Array, Array]:
        token = jax.random.categorical(step_key, fake.params["policy"][token] / fake.temperature).astype(jnp.int32)
        return token, token

    first = jnp.zeros(rows, jnp.int32)
    _, drawn = jax.lax.scan(draw, first, jax.random.split(key, length))
    tokens = jnp.concatenate([first[None], drawn]).T
    positions = jnp.broadcast_to(jnp.arange(length + 1, dtype=jnp.int32), tokens.shape)
    return Sequences(tokens=tokens, positions=positions, segment_ids=jnp.ones_like(tokens), loss_mask=positions > 0)


def value(terms: dict[str, Mean]) -> Array:
    """Σ_terms total / count: what training minimises."""
    return sum((term.compute() for term in terms.values()), jnp.float32(0.0))


@functools.partial(jax.jit, static_argnums=0)
def objective(bound: Any, fake: TabularNets, batch: Any) -> tuple[Array, dict[str, Array]]:
    """The objective's value and its gradient for every table."""
    return jax.value_and_grad(lambda p: value(bound.loss(fake.replace(params=p), batch, None)[0]))(fake.params)


@functools.partial(jax.jit, static_argnums=0)
def loss(bound: Any, fake: TabularNets, batch: Any) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """`bound.loss`, jitted."""
    return bound.loss(fake, batch, None)


@functools.partial(jax.jit, static_argnums=0)
def prepare(bound: Any, fake: TabularNets, batch: Any) -> tuple[Any, Any, dict[str, Mean]]:
    """`bound.prepare` with the carry that the objective starts from, jitted."""
    return bound.prepare(fake, batch, bound.init_carry(fake), jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def outcome(bound: Any, fake: TabularNets, batch: Any) -> dict[str, Any]:
    """All that the objective makes of a batch at the parameters that prepare it, as one program: cheaper to compile than its parts."""
    prepared, carry, before = bound.prepare(fake, batch, bound.init_carry(fake), jax.random.key(0))

    def total(params: Any) -> tuple[Array, Any]:
        terms, metrics = bound.loss(fake.replace(params=params), prepared, None)
        return value(terms), (terms, metrics)

    (loss_, (terms, metrics)), gradient = jax.value_and_grad(total, has_aux=True)(fake.params)
    return {"value": loss_, "gradient": gradient, "terms": terms, "metrics": metrics, "prepared": before, "carry": carry}


def as_numpy(batch: Any) -> Any:
    return jax.tree.map(np.asarray, batch)


def float64(fake: TabularNets) -> tuple[dict[str, np.ndarray], np.ndarray]:
    return {k: np.asarray(v, np.float64) for k, v in fake.params.items()}, np.asarray(fake.frozen["ref"], np.float64)


def descend(bound: Any, fake: TabularNets, batch: Any, *, steps: int, rate: float) -> TabularNets:
    """Plain gradient descent on one fixed batch."""

    def step(params: Any, _: None) -> tuple[Any, None]:
        grads = jax.grad(lambda p: value(bound.loss(fake.replace(params=p), batch, None)[0]))(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), None

    return fake.replace(params=jax.jit(lambda p: jax.lax.scan(step, p, None, length=steps)[0])(fake.params))
