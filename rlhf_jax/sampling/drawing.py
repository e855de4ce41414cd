"""One token per row: whose randomness it is, how the logits become a distribution, and what is drawn from it.

Randomness is counter-based (law 6): a row's key is folded from (run key, iteration, prompt id, sample id), a token's key from (row key, tokens
generated so far), so that what a row draws does not depend on its neighbours, its slot or the number of devices.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.ops import categorical, logit_filters, vocab
from rlhf_jax.sampling.filters import Filters, State
from rlhf_jax.types import Array, Purpose


class Pick(NamedTuple):
    """One drawn token per row."""

    token: Array  # [B] int32
    logp: Array  # [B] float32 nats, of the distribution drawn from
    plain: Array | None  # [B] float32 nats, unfiltered at the same temperature; None: they are `logp`, no filter changes anything


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


def pick(logits: Array, keys: Array, state: State, *, temperature: float, top_k: int, top_p: float, filters: Filters) -> tuple[Pick, State]:
    """One token per row: of the logits after the filters' edits, temperature, top-k, top-p and the filters' cuts.

    Args:
      logits: [B, V] float32.
      keys: [B] typed keys.
      state: of the filters, before this token; `filters.observe` moves it on.
      temperature: divides the logits; 0 takes the likeliest token, whose log-prob under that point mass is 0.
      top_k: keep the k likeliest; 0 keeps all.
      top_p: keep the smallest set of likeliest tokens that holds this mass; 1 keeps all.
      filters: as composed from the config.

    Returns:
      what was drawn, and the state. With a temperature of 0 `plain` is read at temperature 1.
    """
    chex.assert_rank([logits, keys], [2, 1])
    edited, state = filters.edit(logits, state)
    if temperature == 0.0:
        token = categorical.likeliest(edited)
        return Pick(token, jnp.zeros(logits.shape[0], jnp.float32), vocab.logps(logits, token)), state
    kept = logit_filters.top_p(logit_filters.top_k(logit_filters.temperature(edited, t=temperature), k=top_k), p=top_p)
    kept, state = filters.cut(kept, state)
    token, logp = categorical.draw(keys, kept)
    filtered = bool(filters.edits or filters.cuts or 0 < top_k < logits.shape[-1] or top_p < 1)
    plain = vocab.logps(logit_filters.temperature(logits, t=temperature), token) if filtered else None
    return Pick(token, logp, plain), state


class Drawn(NamedTuple):
    """What rows emit: one token each, or a buffer of them."""

    token: Array  # int32
    logp: Array  # float32 nats
    plain: Array | None  # float32 nats
    real: Array  # bool; false after a row's end


def emit(logits: Array, keys: Array, done: Array, state: State, *, temperature: float, top_k: int, top_p: float, stop_ids: tuple[int, ...],
         pad_id: int, filters: Filters) -> tuple[Drawn, Array, State]:
    """`pick` for rows of which some are done: those emit padding.

    Args:
      logits: [B, V] float32.
      keys: [B] typed keys.
      done: [B] bool.
      state: of the filters, before this token.
      temperature, top_k, top_p: as in `pick`.
      stop_ids: tokens that end a row.
      pad_id: what a row that is done emits.
      filters: as composed from the config.

    Returns:
      what was drawn, [B] each; the rows that are done now; the state with the token observed.
    """
    chex.assert_rank([logits, keys, done], [2, 1, 1])
    picked, state = pick(logits, keys, state, temperature=temperature, top_k=top_k, top_p=top_p, filters=filters)
    state = filters.observe(state, picked.token)
    token = jnp.where(done, pad_id, picked.token)
    plain = None if picked.plain is None else jnp.where(done, 0.0, picked.plain)
    stopped = jnp.isin(token, jnp.asarray(stop_ids, jnp.int32)) if stop_ids else jnp.zeros_like(done)
    return Drawn(token, jnp.where(done, 0.0, picked.logp), plain, ~done), filters.ended(done | stopped, state), state


def blank(shape: tuple[int, ...], like: Drawn, pad_id: int) -> Drawn:
    """A buffer into which nothing was drawn yet: what stays so is padding.

    Args:
      shape: of each field.
      like: which fields there are, and their types.
      pad_id: the padding.
    """
    chex.assert_equal_shape([x for x in like if x is not None])
    empty: Drawn = jax.tree.map(lambda x: jnp.zeros(shape, x.dtype), like)
    return empty._replace(token=jnp.full(shape, pad_id, jnp.int32))
