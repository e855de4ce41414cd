"""Continuous batching: few rows decode at once, and a row that has ended makes room for the next prompt of the queue.

One program for a whole queue: as long as prompts or unfinished rows are left, free rows are filled, and a fixed chunk of steps is decoded. Prompts
are prefilled ahead, as many groups at a time as fill all rows once, and wait in a pool until rows are free; a group's rows copy one prefix. All rows
write their caches at the same time t, into slot t mod S (models/cache.py): a row that joins at time t has its prompt moved to the times right before
t, and sees as many slots back as it has tokens. So the step is that of a whole batch, one update in place per layer, and nothing is ever indexed by
row but where rows join. A row's randomness is its own (law 6): refilling changes no token.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.models import cache
from rlhf_jax.ops.partition import constrain
from rlhf_jax.sampling.drawing import Drawn, blank, emit
from rlhf_jax.sampling.filters import State
from rlhf_jax.types import Array, Prompts


class _Rows(NamedTuple):
    """The S rows that decode."""

    row: Array  # [S] int32, which row of the queue; B: none yet
    key: Array  # [S] typed
    made: Array  # [S] int32, tokens generated
    length: Array  # [S] int32, tokens of the prompt
    done: Array  # [S] bool; the row is free
    ended: Array  # [S] bool; done by a stop token or string, not by the budget
    state: State
    logits: Array  # [S, V] float32, of the next token
    cache: Any
    drawn: Drawn  # [S, N]


class _Pool(NamedTuple):
    """Groups whose prompts are prefilled, S / G of them."""

    first: Array  # [] int32, the first one; −S / G: none yet
    state: State
    logits: Array
    cache: Any


class _Queue(NamedTuple):
    time: Array  # [] int32, of the next token
    next: Array  # [] int32, the first row of the queue that has not begun
    rows: _Rows
    pool: _Pool
    drawn: Drawn  # [B + 1, N]; the last row is nobody's
    ended: Array  # [B + 1] bool


class _Read(NamedTuple):
    """Of a prompt, what a network and the filters read."""

    tokens: Array
    positions: Array
    segment_ids: Array


def refilled(nets: Any, prompts: Prompts, keys: Array, *, slots: int, group_size: int, chunk: int, max_new_tokens: int, how: dict[str, Any]
             ) -> tuple[Drawn, Array]:
    """What every row of the queue draws.

    Args:
      nets: as for `generate`, laid out for decoding.
      prompts: [B, P], the queue.
      keys: [B] typed keys, one per row.
      slots: S, rows decoded at once; a multiple of `group_size`.
      group_size: G, divides B; each G neighbours have the same prompt.
      chunk: steps between two looks at which rows are free.
      max_new_tokens: N.
      how: the other arguments of `emit`.

    Returns:
      what was drawn, [B, N] each; the rows that ended otherwise than by the budget, [B] bool.
    """
    chex.assert_rank([prompts.tokens, keys], [2, 1])
    chex.assert_is_divisible(prompts.tokens.shape[0], group_size)
    chex.assert_is_divisible(slots, group_size)
    (batch, width), ahead = prompts.tokens.shape, slots // group_size
    heads = _Read(*(x.reshape(-1, group_size, width)[:, 0] for x in (prompts.tokens, prompts.positions, prompts.segment_ids)))
    heads = jax.tree.map(lambda x: jnp.pad(x, ((0, -x.shape[0] % ahead), (0, 0))), heads)
    lengths = (prompts.segment_ids != 0).sum(axis=-1).astype(jnp.int32)
    work = _Work(nets, heads, keys, lengths, slots, group_size, chunk, max_new_tokens, how)
    queue = jax.lax.while_loop(lambda q: (q.next < batch) | ~q.rows.done.all(), work.advance, work.start())
    return jax.tree.map(lambda x: x[:batch], queue.drawn), queue.ended[:batch]


@dataclasses.dataclass(frozen=True)
class _Work:
    """The parts of the loop, and what does not change in it."""

    nets: Any
    heads: _Read  # [B / G, P], filled up to whole pools
    keys: Array  # [B] typed
    lengths: Array  # [B] int32, tokens of the prompts
    slots: int
    group_size: int
    chunk: int
    new: int  # N
    how: dict[str, Any]

    def start(self) -> _Queue:
        """No prompt has begun, every row is free."""
        ahead, slots, batch, pad = self.slots // self.group_size, self.slots, len(self.keys), self.how["pad_id"]
        shapes = jax.eval_shape(self.prefill, 0)
        what, _, _ = jax.eval_shape(lambda p: emit(p.logits, self.keys[:ahead], jnp.zeros(ahead, bool), p.state, **self.how), shapes)
        rows = lambda x, axis: jnp.zeros((*x.shape[:axis], slots, *x.shape[axis + 1 :]), x.dtype)  # noqa: E731
        pool = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(first=jnp.int32(-ahead))
        counters = jnp.zeros(slots, jnp.int32)
        return _Queue(
            time=jnp.int32(self.heads.tokens.shape[1]), next=jnp.int32(0), pool=pool, drawn=blank((batch + 1, self.new), what, pad),
            ended=jnp.zeros(batch + 1, bool),
            rows=_Rows(
                row=counters + batch, key=jax.random.split(jax.random.key(0), slots), made=counters, length=counters, done=jnp.ones(slots, bool),
                ended=jnp.zeros(slots, bool), state=jax.tree.map(lambda x: rows(x, 0), shapes.state), logits=rows(shapes.logits, 0),
                cache=jax.tree.map(lambda x: rows(x, x.ndim - 4), shapes.cache), drawn=blank((slots, self.new), what, pad),
            ),
        )

    def prefill(self, first: Array | int) -> _Pool:
        """A pool of the groups from `first` on."""
        ahead = self.slots // self.group_size
        part = jax.tree.map(lambda x: constrain(jax.lax.dynamic_slice_in_dim(x, first, ahead), ("batch", None)), self.heads)
        logits, kept = self.nets.prefill(*part, part.tokens.shape[1] + self.new)
        return _Pool(jnp.int32(first), self.how["filters"].start(part, logits.shape[-1]), logits, kept)

    def join(self, queue: _Queue) -> _Queue:
        """Gives the free rows to what the pool holds of the queue; fills the pool first if it holds nothing more."""
        ahead, batch, width = self.slots // self.group_size, len(self.keys), self.heads.tokens.shape[1]
        exhausted = queue.next >= (queue.pool.first + ahead) * self.group_size
        pool = jax.lax.cond(exhausted, lambda p: self.prefill(p.first + ahead), lambda p: p, queue.pool)
        rows, index = queue.rows, queue.next + jnp.cumsum(queue.rows.done) - 1
        new = rows.done & (index < jnp.minimum((pool.first + ahead) * self.group_size, batch))
        row = jnp.where(new, index, rows.row).astype(jnp.int32)
        at, group = row.clip(max=batch - 1), jnp.clip(row // self.group_size - pool.first, 0, ahead - 1)
        take = lambda old, x: _joined(new, old, x[group], 0)  # noqa: E731
        move = lambda old, x: _joined(new, old, jnp.take(x, group, axis=x.ndim - 4), x.ndim - 4, "kv_heads")  # noqa: E731
        empty = blank((self.slots, self.new), rows.drawn, self.how["pad_id"])
        rows = _Rows(
            row=row, key=jnp.where(new, self.keys[at], rows.key), length=jnp.where(new, self.lengths[at], rows.length),
            made=jnp.where(new, 0, rows.made), done=jnp.where(new, self.lengths[at] == 0, rows.done), ended=rows.ended & ~new,
            state=jax.tree.map(take, rows.state, pool.state), logits=take(rows.logits, pool.logits),
            cache=jax.tree.map(move, rows.cache, cache.later(pool.cache, queue.time - width)),
            drawn=jax.tree.map(lambda x, e: _joined(new, x, e, 0), rows.drawn, empty),
        )
        return queue._replace(rows=rows, pool=pool, next=queue.next + new.sum(dtype=jnp.int32))

    def step(self, i: Array, at: tuple[Array, _Rows, Drawn]) -> tuple[Array, _Rows, Drawn]:
        """One token of every row, kept as the chunk's i-th."""
        time, rows, kept = at
        drawn, done, state = emit(rows.logits, jax.vmap(jax.random.fold_in)(rows.key, rows.made), rows.done, rows.state, **self.how)
        kept = jax.tree.map(lambda all, x: jax.lax.dynamic_update_index_in_dim(all, x, i, 0), kept, drawn)
        position, times = rows.length + rows.made, self.heads.tokens.shape[1] + self.new
        age = (time - jnp.arange(times)) % times
        logits, now = self.nets.decode(drawn.token, position, time, age[None, :] <= position[:, None], rows.cache)
        made = rows.made + ~rows.done
        ended = rows.ended | (done & ~rows.done)
        return time + 1, rows._replace(made=made, done=done | (made >= self.new), ended=ended, state=state, logits=logits, cache=now), kept

    def advance(self, queue: _Queue) -> _Queue:
        """Fills the free rows, and decodes a chunk."""
        batch, chunk = len(self.keys), self.chunk
        queue = jax.lax.while_loop(lambda q: (q.next < batch) & q.rows.done.any(), self.join, queue)
        kept = blank((chunk, self.slots), queue.rows.drawn, self.how["pad_id"])
        time, rows, kept = jax.lax.fori_loop(0, chunk, self.step, (queue.time, queue.rows, kept))
        at = jnp.arange(self.new)[None, :] - queue.rows.made[:, None]
        late = at.clip(0, chunk - 1)
        drawn = jax.tree.map(lambda all, x: jnp.where((at >= 0) & (at < chunk), jnp.take_along_axis(x.T, late, axis=1), all), rows.drawn, kept)
        return queue._replace(
            time=time, rows=rows._replace(drawn=drawn), drawn=jax.tree.map(lambda all, x: all.at[rows.row].set(x), queue.drawn, drawn),
            ended=queue.ended.at[rows.row].set(rows.ended),
        )


def _joined(new: Array, old: Array, x: Array, axis: int, *names: str) -> Array:
    """`x` in the rows that are `new`; rows lie along `axis`, `names` are the axes behind it, and all stays where it is on the mesh."""
    picked = jnp.where(new.reshape((-1,) + (1,) * (old.ndim - axis - 1)), x, old)
    return constrain(picked, (*(None,) * axis, "batch", *names, *(None,) * (old.ndim - axis - 1 - len(names))))
