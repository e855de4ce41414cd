"""Continuous batching: whoever joins when, every row draws what it draws in a whole batch; and what that costs."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import distributed, sampling, sharding
from rlhf_jax.models import transformer
from rlhf_jax.sampling import filters
from rlhf_jax.types import Prompts, Rollout
from tests.models import tiny
from tests.sampling.test_decode import SCANNED, Counting, grouped, loop_copies, same_rollout, token_loops
from tests.sampling.test_filters import BPE, entry, spelled
from tests.sampling.test_sampler import SETTINGS, generate, prompts, texts, trainer_logps

ENDING = {"stop_ids": (3, 5, 6, 9), "max_new_tokens": 14}

CASES: dict[str, dict[str, Any]] = {
    "one at a time": {"slots": 1, "chunk": 5},
    "five, a chunk that does not divide": {"slots": 5, "chunk": 4},
    "never ending": {"slots": 4, "stop_ids": (), "max_new_tokens": 6, "chunk": 4},
    "groups over units of a scan": {"slots": 8, "group_size": 4, "chunk": 3, "config": SCANNED, "top_p": 0.9},
    "rings": {"slots": 4, "group_size": 2, "chunk": 6, "config": tiny.config(windows=(3, 0)), "temperature": 1.4},
    "greedy": {"slots": 6, "group_size": 2, "chunk": 4, "temperature": 0.0},
}


@pytest.mark.parametrize("name", CASES)
def test_refilling_changes_no_token(name: str) -> None:
    """Against the whole batch at once; with filler rows amid the queue, and whole groups of them."""
    how = {**ENDING, **CASES[name]}
    batch = grouped(how.get("group_size", 1))
    batch = batch.replace(segment_ids=jnp.where((jnp.arange(16)[:, None] // 4) == 1, 0, batch.segment_ids))
    whole = generate(batch, **{k: v for k, v in how.items() if k not in ("slots", "chunk")})
    same_rollout(generate(batch, **how), whole)
    lengths = whole.seqs.loss_mask.sum(-1)
    assert not lengths[4:8].any() and (len(set(lengths.tolist())) > 3 or name == "never ending")


def test_what_filters_have_seen_goes_with_the_row() -> None:
    """Penalties and counters, and stop strings across the borders of tokens: the state of a row that joins is its own."""
    letters = tuple(at for at, piece in enumerate(spelled()) if piece and set(piece) <= set(b"ab"))
    config = tiny.config(vocab_size=BPE.vocab_size, layers=1)
    listed = (entry("repetition_penalty", 1.2), entry("frequency_penalty", 0.2), entry("bad_words", ("bbb", (letters[0], letters[1]))),
              entry("allowed", letters), entry("min_new_tokens", 3), entry("min_p", 0.05))
    composed = filters.build(listed, ("babb", "aaa"), tokenizer=BPE, vocab_size=BPE.vocab_size)
    batch = prompts([(20, letters[b % 5]) for b in range(12)], 3)
    how = {**SETTINGS, "iteration": 0, "max_new_tokens": 10, "temperature": 3.0, "stop_ids": (), "filters": composed, "chunk": 3}
    run = tiny.jit(lambda n, p, s: sampling.generate(n, p, jax.random.key(2), slots=s, **how), static_argnums=2)
    few, whole = (jax.tree.map(np.asarray, run(tiny.nets(config), batch, slots)) for slots in (3, 0))
    same_rollout(few, whole)
    assert 0 < whole.truncated.sum() < 12


def test_every_second_row_may_be_an_opponents() -> None:
    batch, nets = grouped(4), tiny.nets()
    other = nets.replace(params={"policy": tiny.params(tiny.BASE, 7)})
    run = tiny.jit(lambda a, b, p, s: sampling.generate_against(a, b, p, jax.random.key(0), group_size=4, slots=s, iteration=0, **SETTINGS),
                   static_argnums=3)
    same_rollout(*(jax.tree.map(np.asarray, run(nets, other, batch, slots)) for slots in (8, 0)))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["rows", "rows and heads"])
def test_eight_devices_refill_as_one_does(sizes: dict[str, int]) -> None:
    """A device keeps its own rows' cache, and of them its own heads; where only rows are split, none asks another for anything per token."""
    with tiny.uncached():  # make_mesh switches the cache off for good
        mesh = distributed.make_mesh(sizes)
    config = tiny.config(vocab_size=18, layers=1)  # `tensor` divides it
    nets, batch, how = tiny.nets(config), grouped(2), {**SETTINGS, **ENDING, "group_size": 2, "slots": 8, "chunk": 4}
    where = sharding.parameter_shardings(mesh, {"policy": transformer.logical_axes(config)}, nets.params)
    run = sharding.jit(lambda n, p: sampling.generate(n, p, jax.random.key(0), iteration=2, **how), mesh)
    placed = nets.replace(params=jax.device_put(nets.params, where)), distributed.to_global(batch, sharding.row_sharding(mesh))
    with tiny.uncached():
        run = run.lower(*placed).compile(tiny.SHIPPED)
    same_rollout(jax.tree.map(np.asarray, run(*placed)), generate(batch, config=config, **{**how, "slots": 0}))
    heads = sizes.get("tensor", 1)
    (body,) = token_loops(run.as_text(), heads * 21 * 2 // heads * 4)
    assert heads == 1 or not re.search(r"f32\[\d+,2,(4,21|21,4)\]\S* all-gather", run.as_text()), "rows that join bring their own heads alone"
    assert re.search(rf"f32\[{heads},{2 // heads},4,21\]\S* (dynamic-update-slice|fusion)\(", body)
    assert not re.search(r"f32\[8,[12],|f32\[2,2,(4,21|21,4)\]", body)
    collectives = re.findall(r" (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\(", body)
    assert (len(collectives) > 0) == (heads > 1), collectives


# --- law 6 at batch 1 and 64, with and without refilling ---


@functools.partial(tiny.jit, static_argnums=(1, 2))
def noise(keys: Any, new: int, vocabulary: int) -> Any:
    """[B, N, V], Gumbel noise of each row's tokens."""
    return jax.vmap(lambda key: jax.vmap(lambda n: jax.random.gumbel(jax.random.fold_in(key, n), (vocabulary,)))(jnp.arange(new)))(keys)


def divergences(one: Rollout, other: Rollout, params: Any, config: Any, seed: int) -> list[tuple[int, int, float]]:
    """Row, new token and margin of the draw at which each row that differs first does: the best candidate's lead over the second."""
    new = one.seqs.loss_positions.shape[1]
    keys = sampling.row_keys(jax.random.key(seed), 2, jnp.asarray(one.prompt_ids), jnp.asarray(one.sample_ids))
    logits = np.asarray(tiny.logits(config, params, one.seqs))[:, -new - 1 : -1]
    ranked = np.sort(logits + np.asarray(noise(keys, new, logits.shape[-1])), axis=-1)
    apart = one.seqs.tokens[:, -new:] != other.seqs.tokens[:, -new:]
    return [(b, t, float(ranked[b, t, -1] - ranked[b, t, -2])) for b in np.flatnonzero(apart.any(-1)) for t in [int(apart[b].argmax())]]


def sixty_four() -> Prompts:
    return prompts([texts()[b % 16] for b in range(64)], 6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_batch_1_and_64_refilled_or_not_draw_the_same(seed: int) -> None:
    """On the committed seeds the same tokens; on any other a difference is legal only where two candidates were within 1e-4. Counted: none."""
    config, how = tiny.BASE, {"seed": seed, "stop_ids": (3,), "max_new_tokens": 16, "config": tiny.BASE}
    batch = sixty_four()
    whole = generate(batch, **how)
    alone = [generate(jax.tree.map(lambda x, b=b: x[b : b + 1], batch), **how) for b in range(0, 64, 7)]
    together = jax.tree.map(lambda x: x[::7], whole)
    others = [(whole, generate(batch, slots=8, chunk=4, **how)), (together, jax.tree.map(lambda *x: np.concatenate(x), *alone))]
    found = [margin for a, b in others for _, _, margin in divergences(a, b, tiny.params(config), config, seed)]
    assert all(margin < 1e-4 for margin in found), found
    assert len(found) == 0 and (whole.seqs.loss_mask.sum(-1) < 16).any()


def test_a_margin_is_what_decides_a_draw() -> None:
    """With slightly other weights some rows part; where they do, the lead was below twice the gap of the logits there."""
    config, batch, new = tiny.BASE, sixty_four(), 16
    nets, moved = tiny.nets(config), jax.tree.map(lambda x: x * (1 + 1e-2), tiny.params(config))
    run = tiny.jit(lambda n: sampling.generate(n, batch, jax.random.key(0), iteration=2, **{**SETTINGS, "stop_ids": (), "max_new_tokens": new}))
    one, other = (jax.tree.map(np.asarray, run(n)) for n in (nets, nets.replace(params={"policy": moved})))
    gaps = np.abs(np.asarray(tiny.logits(config, moved, one.seqs)) - np.asarray(tiny.logits(config, tiny.params(config), one.seqs))).max(-1)
    found = divergences(one, other, tiny.params(config), config, 0)
    assert len(found) > 3 and all(margin <= 2 * gaps[b, -new - 1 + t] + 1e-4 for b, t, margin in found), found


# --- the work ---


def test_free_rows_are_filled_and_prompts_prefilled_once() -> None:
    """Steps: those of the rows laid end to end, not the longest row's in every batch of four."""
    batch, how, width = prompts(list(texts()), 6), {**SETTINGS, **ENDING, "chunk": 2}, 6
    noted = Counting(tiny.nets(tiny.config(layers=1)), [])
    prefilled: list[int] = []
    original = noted.nets.prefill

    def prefill(tokens: Any, *rest: Any) -> Any:
        jax.debug.callback(lambda: prefilled.append(tokens.shape[0]))
        return original(tokens, *rest)

    object.__setattr__(noted, "prefill", prefill)
    rolled = jax.tree.map(np.asarray, tiny.jit(lambda p: sampling.generate(noted, p, jax.random.key(0), iteration=2, slots=4, **how))(batch))
    jax.effects_barrier()
    lengths = rolled.seqs.loss_mask.sum(-1)
    assert sorted(noted.steps) == list(range(width, width + len(noted.steps))) and prefilled == [4] * 4
    in_batches = sum(lengths[b : b + 4].max() for b in range(0, 16, 4))
    assert lengths.sum() / 4 <= len(noted.steps) < min(in_batches, (lengths.sum() + 2 * 16) / 4 + lengths.max()), (len(noted.steps), in_batches)


def test_a_chunk_is_no_longer_than_a_row() -> None:
    noted = Counting(tiny.nets(tiny.config(layers=1)), [])
    how = {**SETTINGS, "stop_ids": (), "max_new_tokens": 5}
    run = tiny.jit(lambda p: sampling.generate(noted, p, jax.random.key(0), iteration=2, slots=8, **how).truncated)
    run(prompts(list(texts()), 6)).block_until_ready()
    jax.effects_barrier()
    assert len(noted.steps) == 2 * 5


@pytest.mark.parametrize(("config", "kind"), [(tiny.BASE, "same"), (SCANNED, "int8")], ids=["float32", "int8"])
def test_the_cache_is_not_copied_per_token(config: Any, kind: str) -> None:
    """Sixteen slots of thirty-two rows. Where rows join, once per chunk at most, the cache is written whole."""
    batch = prompts(list(texts()) * 2, 6)
    settings = {**SETTINGS, "max_new_tokens": 40, "slots": 16, "chunk": 8}
    run = jax.jit(lambda n, p, k: sampling.generate(n, p, k, iteration=0, **settings))
    text = run.lower(tiny.nets(config, cache=kind), batch, jax.random.key(0)).compile().as_text()
    size = 16 * 46 * config.kv_heads * config.head_dim
    (body,) = token_loops(text, size)
    assert loop_copies(text, size, [body]) == [] and len(loop_copies(text, size)) >= 2


def test_one_program_serves_queues_of_any_lengths() -> None:
    run = tiny.jit(lambda n, p, k: sampling.generate(n, p, k, iteration=0, **{**SETTINGS, "slots": 4, "chunk": 2}))
    ended = {int(np.asarray(run(tiny.nets(), prompts(list(texts())[b : b + 8], 6), jax.random.key(b)).seqs.loss_mask).sum()) for b in range(5)}
    assert len(ended) > 2 and run._cache_size() == 1


def test_refilled_rows_have_the_trainers_log_probs() -> None:
    config = tiny.config(windows=(4, 0))
    rollout = generate(grouped(2), config=config, group_size=2, slots=4, chunk=3, temperature=0.8, **ENDING)
    mask = rollout.seqs.loss_mask
    gaps = np.abs(trainer_logps(rollout, config, 0.8) - rollout.plain_logps)[mask]
    assert mask.sum() > 32 and gaps.max() <= 1e-4 and np.percentile(gaps, 99) <= 1e-4, gaps.max()


def test_slots_that_do_not_hold_whole_groups_are_refused() -> None:
    with pytest.raises(AssertionError):
        sampling.generate(tiny.nets(), grouped(4), jax.random.key(0), iteration=0, slots=6, group_size=4, **SETTINGS)
