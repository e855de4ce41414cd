"""Generation: prefill, then a `lax.scan` that decodes one token per step into an explicit KV cache.

Prompts are padded on the left, so that step i writes slot P + i in every row. Randomness is counter-based (law 6): a row's key is folded
from (run key, iteration, prompt id, sample id) and a token's key from (row key, tokens generated so far), so what a row draws does not
depend on its neighbours, its slot or the number of devices. A row that has drawn a stop token emits padding from then on.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.ops import logit_filters, vocab
from rlhf_jax.types import Array, Prompts, Purpose, Rollout, Sequences


def row_keys(key: Array, iteration: Array | int, prompt_ids: Array, sample_ids: Array) -> Array:
    """[B] typed keys, a function of (key, iteration, prompt id, sample id) alone.

    Args:
      key: [] typed key of the run.
      iteration: [] int32, the iteration that issued the rollout.
      prompt_ids, sample_ids: [B] int32.
    """
    chex.assert_rank([prompt_ids, sample_ids], 1)
    chex.assert_equal_shape([prompt_ids, sample_ids])
    run = jax.random.fold_in(jax.random.fold_in(key, Purpose.ROLLOUT), iteration)
    return jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(run, p), s))(prompt_ids, sample_ids)


def draw(logits: Array, keys: Array, *, temperature: float, top_k: int, top_p: float) -> tuple[Array, Array]:
    """One token per row, and its log-prob under the distribution drawn from, filters included.

    Args:
      logits: [B, V] float32.
      keys: [B] typed keys.
      temperature: divides the logits; 0 takes the likeliest token, whose log-prob under that point mass is 0.
      top_k: keep the k likeliest; 0 keeps all.
      top_p: keep the smallest set of likeliest tokens that holds this mass; 1 keeps all.

    Returns:
      tokens [B] int32, log-probs [B] float32 nats.
    """
    chex.assert_rank([logits, keys], [2, 1])
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[0], jnp.float32)
    logits = logit_filters.top_p(logit_filters.top_k(logit_filters.temperature(logits, t=temperature), k=top_k), p=top_p)
    tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return tokens, vocab.logps(logits, tokens)


def generate(
    nets: Any, prompts: Prompts, key: Array, *, iteration: Array | int, max_new_tokens: int, temperature: float, top_k: int, top_p: float,
    stop_ids: tuple[int, ...], pad_id: int,
) -> Rollout:
    """Samples one completion per row.

    Args:
      nets: has `prefill` and `decode` (models/networks.py).
      prompts: [B, P], padded on the left.
      key: [] typed key of the run.
      iteration: [] int32, folded into every row's key, and the rollout's `version`.
      max_new_tokens: N, tokens; a row that has not stopped by then is `truncated`.
      temperature, top_k, top_p: as in `draw`.
      stop_ids: tokens that end a row; the stop token itself is kept and trained on.
      pad_id: what fills the slots after the end; it may equal a stop token, since padding is known by its segment id.

    Returns:
      A rollout of [B, P + N] rows: prompt slots, then N new ones. Segment id 0 marks padding on both sides; `loss_mask` marks the
      new tokens; `loss_positions` the N new slots. Scores, values and trainer log-probs are yet to be filled.
    """
    chex.assert_rank([prompts.tokens, prompts.prompt_ids], [2, 1])
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: sample at least one token")
    width = prompts.tokens.shape[1]
    slots = width + max_new_tokens
    keys = row_keys(key, iteration, prompts.prompt_ids, prompts.sample_ids)
    lengths = (prompts.segment_ids != 0).sum(axis=-1).astype(jnp.int32)
    prompt_visible = jnp.pad(prompts.segment_ids != 0, ((0, 0), (0, max_new_tokens)))
    slot_index = jnp.arange(slots)[None, :]

    def pick(logits: Array, count: Array | int) -> tuple[Array, Array]:
        token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, count)
        return draw(logits, token_keys, temperature=temperature, top_k=top_k, top_p=top_p)

    def emit(logits: Array, done: Array, count: Array | int) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        token, logp = pick(logits, count)
        token, logp = jnp.where(done, pad_id, token), jnp.where(done, 0.0, logp)
        stopped = jnp.isin(token, jnp.asarray(stop_ids, jnp.int32)) if stop_ids else jnp.zeros_like(done)
        return (token, done | stopped), (token, logp, ~done)

    def step(carry: Any, count: Array) -> Any:
        token, done, cache = carry
        slot = width + count - 1
        # A finished row goes on decoding padding that nobody reads: its rows of the cache are its own.
        visible = prompt_visible | ((slot_index >= width) & (slot_index <= slot))
        logits, cache = nets.decode(token, lengths + count - 1, slot, visible, cache)
        (token, done), out = emit(logits, done, count)
        return (token, done, cache), out

    logits, cache = nets.prefill(prompts.tokens, prompts.positions, prompts.segment_ids, slots)
    (token, done), first = emit(logits, ~prompts.real, 0)
    (_, done, _), rest = jax.lax.scan(step, (token, done, cache), jnp.arange(1, max_new_tokens))
    tokens, logps, real = (jnp.concatenate([a[None], b]).swapaxes(0, 1) for a, b in zip(first, rest, strict=True))
    return _assemble(prompts, lengths, tokens, logps, real, ~done, jnp.asarray(iteration, jnp.int32))


def generate_against(nets: Any, opponent: Any, prompts: Prompts, key: Array, **settings: Any) -> Rollout:
    """`generate`, with every second row drawn by an opponent: even samples of a prompt are the policy's, odd ones the opponent's.

    A row draws what it would draw among rows of its own drawer alone, since its key is a function of its own counters. `sampler_logps` are those of
    the distribution drawn from, on odd rows the opponent's.

    Args:
      nets: the policy; draws rows 0, 2, 4 …
      opponent: has `prefill` and `decode`; draws rows 1, 3, 5 …
      prompts: [B, P], both samples of a pair neighbours.
      key: [] typed key of the run.
      settings: as in `generate`.

    Returns:
      A rollout of [B, P + N] rows in the order of the prompts.
    """
    chex.assert_is_divisible(prompts.prompt_ids.shape[0], 2)
    # Strided: the contiguous split of a sharded batch, or a concatenation of its halves, would make the partitioner move rows.
    mine, theirs = (jax.tree.map(lambda x, k=k: x.reshape(-1, 2, *x.shape[1:])[:, k], prompts) for k in (0, 1))
    rolled = generate(nets, mine, key, **settings), generate(opponent, theirs, key, **settings)
    return jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]), *rolled)


def _assemble(prompts: Prompts, lengths: Array, tokens: Array, logps: Array, real: Array, truncated: Array, iteration: Array) -> Rollout:
    """Puts prompt and new slots together; new arrays are [B, N]."""
    batch, width = prompts.tokens.shape
    count = tokens.shape[1]
    positions = jnp.where(real, lengths[:, None] + jnp.arange(count)[None, :], 0)
    join = lambda left, right: jnp.concatenate([left, right], axis=1)  # noqa: E731
    zeros = jnp.zeros((batch, width), jnp.float32)
    seqs = Sequences(
        tokens=join(prompts.tokens, tokens),
        positions=join(prompts.positions, positions.astype(jnp.int32)),
        segment_ids=join(prompts.segment_ids, real.astype(jnp.int32)),
        loss_mask=join(zeros.astype(bool), real),
        loss_positions=jnp.broadcast_to(width + jnp.arange(count, dtype=jnp.int32)[None, :], (batch, count)),
    )
    return Rollout(
        seqs=seqs,
        sampler_logps=join(zeros, logps),
        prompt_ids=prompts.prompt_ids,
        sample_ids=prompts.sample_ids,
        group_ids=prompts.group_ids,
        truncated=truncated & prompts.real,
        version=jnp.full((batch,), iteration, jnp.int32),
    )
