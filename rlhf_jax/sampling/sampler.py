"""Generation: prefill, then a compiled loop that decodes one token per step into an explicit KV cache.

Prompts are padded on the left, so that step i writes slot P + i in every row; the rows of a group share one prompt, which is prefilled once. A row
that has drawn a stop token, or the token that completes a stop string, emits padding from then on; between two chunks of steps the loop ends if every
row has. With `slots`, fewer rows decode at once, and those that have ended make room for others (sampling/slots.py).
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.sampling import filters as composed
from rlhf_jax.sampling.drawing import Drawn, blank, emit, row_keys
from rlhf_jax.sampling.filters import Filters, State
from rlhf_jax.sampling.slots import refilled
from rlhf_jax.types import Array, Prompts, Rollout, Sequences

CHUNK = 32  # steps between two looks at whether every row is done; on several devices a look is a reduction over all of them


def generate(
    nets: Any, prompts: Prompts, key: Array, *, iteration: Array | int, max_new_tokens: int, temperature: float, top_k: int, top_p: float,
    stop_ids: tuple[int, ...], pad_id: int, filters: Filters = composed.NONE, group_size: int = 1, chunk: int = CHUNK, slots: int = 0,
    generated: Array | None = None,
) -> Rollout:
    """Samples one completion per row.

    Args:
      nets: has `decoding`, `prefill` and `decode` (models/networks.py).
      prompts: [B, P], padded on the left.
      key: [] typed key of the run.
      iteration: [] int32, folded into every row's key, and the rollout's `version`.
      max_new_tokens: N, tokens; a row that has not stopped by then is `truncated`.
      temperature, top_k, top_p: as in `pick`.
      stop_ids: tokens that end a row; the stop token itself is kept and trained on.
      pad_id: what fills the slots after the end; it may equal a stop token, since padding is known by its segment id.
      filters: further filters, and the stop strings; the token that completes one ends the row as a stop token does.
      group_size: G, divides B; each G neighbours have the same prompt, and it is prefilled once. 1: every row its own.
      chunk: steps after which decoding ends if every row is done, or with `slots` rows are replaced; 0 = never. It changes no token.
      slots: rows decoded at once, a multiple of G; a row that has ended is replaced by the next one. 0, or B and more: all. It changes no token.
      generated: [B] int32, tokens that each row has drawn in earlier turns, which its prompt holds: its keys count on from there; not with `slots`.
        None: there were no turns.

    Returns:
      A rollout of [B, P + N] rows: prompt slots, then N new ones. Segment id 0 marks padding on both sides; `loss_mask` marks the
      new tokens; `loss_positions` the N new slots. Scores, values and trainer log-probs are yet to be filled.
    """
    chex.assert_rank([prompts.tokens, prompts.prompt_ids], [2, 1])
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: sample at least one token")
    if generated is not None and slots:
        raise ValueError(f"slots is {slots}: rows that go on from earlier turns are decoded all at once")
    nets, (batch, width) = nets.decoding(), prompts.tokens.shape
    keys = row_keys(key, iteration, prompts.prompt_ids, prompts.sample_ids)
    how: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, stop_ids=stop_ids, pad_id=pad_id, filters=filters)
    lengths = (prompts.segment_ids != 0).sum(axis=-1).astype(jnp.int32)
    if 0 < slots < batch:
        steps = min(chunk or CHUNK, max_new_tokens)
        drawn, done = refilled(nets, prompts, keys, slots=slots, group_size=group_size, chunk=steps, max_new_tokens=max_new_tokens, how=how)
        return _assemble(prompts, lengths, drawn, ~done, jnp.asarray(iteration, jnp.int32), group_size)
    prompt_visible = jnp.pad(prompts.segment_ids != 0, ((0, 0), (0, max_new_tokens)))
    slot_index = jnp.arange(width + max_new_tokens)[None, :]

    def record(logits: Array, done: Array, state: State, count: Array | int, drawn: Drawn | None) -> tuple[Array, Array, State, Drawn]:
        number = count if generated is None else generated + count
        token_keys = jax.vmap(jax.random.fold_in, (0, None if generated is None else 0))(keys, number)
        new, done, state = emit(logits, token_keys, done, state, **how)
        if drawn is None:  # what an early end leaves unwritten is padding
            drawn = blank((max_new_tokens, done.shape[0]), new, pad_id)
        return new.token, done, state, jax.tree.map(lambda all, x: jax.lax.dynamic_update_index_in_dim(all, x, count, 0), drawn, new)

    def step(count: Array, carry: Any) -> Any:
        token, done, state, drawn, cache = carry
        slot = width + count - 1
        # A finished row goes on decoding padding that nobody reads: its rows of the cache are its own.
        visible = prompt_visible | ((slot_index >= width) & (slot_index <= slot))
        logits, cache = nets.decode(token, lengths + count - 1, slot, visible, cache)
        return *record(logits, done, state, count, drawn), cache

    logits, cache = _prefill(nets, prompts, width + max_new_tokens, group_size)
    carry = (*record(logits, ~prompts.real, filters.start(prompts, logits.shape[-1]), 0, None), cache)
    _, done, _, drawn, _ = _loop(step, carry, max_new_tokens, chunk)
    drawn = jax.tree.map(lambda x: x.swapaxes(0, 1), drawn)
    return _assemble(prompts, lengths, drawn, ~done, jnp.asarray(iteration, jnp.int32), group_size)


def _prefill(nets: Any, prompts: Prompts, slots: int, group_size: int) -> tuple[Array, Any]:
    """Logits after the prompts and their cache, each group's prompt computed once. Rows are the fourth axis from the end of what a cache holds."""
    read = (prompts.tokens, prompts.positions, prompts.segment_ids)
    if group_size == 1:
        return nets.prefill(*read, slots)
    chex.assert_is_divisible(prompts.tokens.shape[0], group_size)
    logits, cache = nets.prefill(*(x.reshape(-1, group_size, *x.shape[1:])[:, 0] for x in read), slots)
    return _repeat(logits, 0, group_size), jax.tree.map(lambda x: _repeat(x, x.ndim - 4, group_size), cache)


def _repeat(x: Array, axis: int, times: int) -> Array:
    """jnp.repeat, as a broadcast, which a sharded array does not have to move for."""
    shape = (*x.shape[: axis + 1], times, *x.shape[axis + 1 :])
    return jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape).reshape(*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :])


def _loop(step: Any, carry: Any, steps: int, chunk: int) -> Any:
    """`step(i, carry)` for i = 1 … steps − 1, or as far as the end of the chunk in which the last row was done (carry[1])."""
    if chunk == 0 or steps - 1 <= chunk:
        return jax.lax.fori_loop(1, steps, step, carry)

    def more(at: Any) -> Array:
        count, (_, done, *_) = at
        return (count < steps) & ~done.all()

    def advance(at: Any) -> Any:
        count, carry = at
        end = jnp.minimum(count + chunk, steps)
        return end, jax.lax.fori_loop(count, end, step, carry)

    return jax.lax.while_loop(more, advance, (jnp.int32(1), carry))[1]


def generate_against(nets: Any, opponent: Any, prompts: Prompts, key: Array, *, group_size: int = 1, slots: int = 0, **settings: Any) -> Rollout:
    """`generate`, with every second row drawn by an opponent: even samples of a prompt are the policy's, odd ones the opponent's.

    A row draws what it would draw among rows of its own drawer alone, since its key is a function of its own counters. `sampler_logps` are those of
    the distribution drawn from, on odd rows the opponent's.

    Args:
      nets: the policy; draws rows 0, 2, 4 …
      opponent: has `decoding`, `prefill` and `decode`; draws rows 1, 3, 5 …
      prompts: [B, P], both samples of a pair neighbours.
      key: [] typed key of the run.
      group_size: G, even or 1; each G neighbours have the same prompt, half of them are the policy's.
      slots: rows decoded at once, even, half of them the policy's; 0 = all.
      settings: as in `generate`.

    Returns:
      A rollout of [B, P + N] rows in the order of the prompts.
    """
    chex.assert_is_divisible(prompts.prompt_ids.shape[0], 2)
    # Strided: the contiguous split of a sharded batch, or a concatenation of its halves, would make the partitioner move rows.
    mine, theirs = (jax.tree.map(lambda x, k=k: x.reshape(-1, 2, *x.shape[1:])[:, k], prompts) for k in (0, 1))
    settings |= {"group_size": max(group_size // 2, 1), "slots": slots // 2}
    rolled = generate(nets, mine, key, **settings), generate(opponent, theirs, key, **settings)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]), *rolled)
    return both.replace(seqs=both.seqs.replace(prefix=(group_size, prompts.tokens.shape[1])))


def _assemble(prompts: Prompts, lengths: Array, drawn: Drawn, truncated: Array, iteration: Array, group_size: int) -> Rollout:
    """Puts prompt and new slots together; what was drawn is [B, N]."""
    batch, width = prompts.tokens.shape
    count = drawn.token.shape[1]
    positions = jnp.where(drawn.real, lengths[:, None] + jnp.arange(count)[None, :], 0)
    join = lambda left, right: jnp.concatenate([left, right], axis=1)  # noqa: E731
    zeros = jnp.zeros((batch, width), jnp.float32)
    seqs = Sequences(
        tokens=join(prompts.tokens, drawn.token),
        positions=join(prompts.positions, positions.astype(jnp.int32)),
        segment_ids=join(prompts.segment_ids, drawn.real.astype(jnp.int32)),
        loss_mask=join(zeros.astype(bool), drawn.real),
        loss_positions=jnp.broadcast_to(width + jnp.arange(count, dtype=jnp.int32)[None, :], (batch, count)),
        prefix=(group_size, width),
    )
    sampler_logps = join(zeros, drawn.logp)
    return Rollout(
        seqs=seqs,
        sampler_logps=sampler_logps,
        plain_logps=sampler_logps if drawn.plain is None else join(zeros, drawn.plain),
        prompt_ids=prompts.prompt_ids,
        sample_ids=prompts.sample_ids,
        group_ids=prompts.group_ids,
        truncated=truncated & prompts.real,
        version=jnp.full((batch,), iteration, jnp.int32),
    )
