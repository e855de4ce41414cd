"""The sampler against the trainer, against exact probabilities, and against itself: alone, in company, padded, sharded."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import distributed, sampling, sharding
from rlhf_jax.models import transformer
from rlhf_jax.sampling.filters import State
from rlhf_jax.types import Prompts
from tests.models import tiny

V, N = tiny.V, 8
BASE = tiny.config(layers=1)
SETTINGS = {"max_new_tokens": N, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "stop_ids": (3,), "pad_id": 0}


@functools.cache
def texts() -> tuple[tuple[int, ...], ...]:
    """Sixteen prompts of 1 to 6 tokens."""
    rng = np.random.default_rng(5)
    return tuple(tuple(int(t) for t in rng.integers(4, V, rng.integers(1, 7))) for _ in range(16))


def prompts(rows: list[tuple[int, ...]], width: int, ids: list[int] | None = None) -> Prompts:
    """Rows padded on the left to `width`; an empty one is filler."""
    tokens, segments, positions = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    for b, row in enumerate(rows):
        if row:
            tokens[b, -len(row) :], segments[b, -len(row) :], positions[b, -len(row) :] = row, 1, np.arange(len(row))
    index = np.asarray(range(len(rows)) if ids is None else ids, np.int32)
    as_jax = functools.partial(jax.tree.map, jnp.asarray)
    return as_jax(Prompts(tokens=tokens, positions=positions, segment_ids=segments, prompt_ids=index, sample_ids=index * 0 + 1,
                          group_ids=np.arange(len(rows), dtype=np.int32)))


@functools.cache
def program(config: Any, settings: tuple[tuple[str, Any], ...]) -> Any:
    return tiny.jit(lambda nets, prompts, key, iteration: sampling.generate(nets, prompts, key, iteration=iteration, **dict(settings)))


def generate(batch: Prompts, *, config=BASE, seed: int = 0, iteration: int = 2, **changes):
    """A rollout, as NumPy."""
    settings = {**SETTINGS, **changes}
    nets = tiny.nets(config, temperature=settings["temperature"] or 1.0)
    rollout = program(config, tuple(settings.items()))(nets, batch, jax.random.key(seed), jnp.int32(iteration))
    return jax.tree.map(np.asarray, rollout)


@functools.cache
def everyone(**changes):
    return generate(prompts(list(texts()), 6), **changes)


def new(rollout, width: int = 6):
    """The tokens and log-probs of the new slots."""
    return rollout.seqs.tokens[:, width:], rollout.sampler_logps[:, width:]


@tiny.jit
def trainer(nets, seqs):
    return nets.policy(seqs).logps


def trainer_logps(rollout, config=BASE, temperature: float = 1.0) -> np.ndarray:
    return np.asarray(trainer(tiny.nets(config, temperature=temperature), rollout.seqs))


def distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The filtered distribution of one row in float64, by sorting and looping: temperature, then top-k, then top-p."""
    logits = np.asarray(logits, np.float64) / temperature
    ranked = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    kept = ranked[:top_k] if top_k else ranked
    weights = {v: np.exp(logits[v] - logits[ranked[0]]) for v in kept}
    total, nucleus, mass = sum(weights.values()), [], 0.0
    for v in kept:
        if nucleus and mass >= top_p:
            break
        nucleus.append(v)
        mass += weights[v] / total
    out = np.zeros(len(logits))
    for v in nucleus:
        out[v] = weights[v] / sum(weights[u] for u in nucleus)
    return out


# --- sampler ≡ trainer ---


@pytest.mark.parametrize(("config", "temperature"), [(tiny.BASE, 1.0), (tiny.config(scan_layers=True, logits_chunk=3), 0.6)])
def test_sampler_and_trainer_agree_on_every_tokens_log_prob(config, temperature):
    """The largest gap over tokens, with more padding and in other company."""
    for rows, width in ((list(texts()), 9), ([texts()[3]], 6)):
        rollout = generate(prompts(rows, width), config=config, temperature=temperature, stop_ids=(3,) if len(rows) > 1 else ())
        mask = rollout.seqs.loss_mask
        gap = np.abs(trainer_logps(rollout, config, temperature) - rollout.sampler_logps)[mask]
        assert mask.sum() > N / 2 and gap.max() < 2e-5, gap.max()
        assert not rollout.sampler_logps[~mask].any() and (rollout.sampler_logps[mask] < 0).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (0, 0.7), (6, 0.8)])
def test_with_filters_the_log_prob_is_that_of_the_filtered_distribution(top_k, top_p):
    rollout = everyone(top_k=top_k, top_p=top_p, temperature=1.3)
    logits = np.asarray(tiny.logits(BASE, tiny.params(BASE), rollout.seqs))
    gaps = []
    for b, t in zip(*np.nonzero(rollout.seqs.loss_mask)):
        probability = distribution(logits[b, t - 1], 1.3, top_k, top_p)[rollout.seqs.tokens[b, t]]
        assert probability > 0, "drew a token that the filter had removed"
        gaps.append(abs(np.log(probability) - rollout.sampler_logps[b, t]))
    assert max(gaps) < 5e-5
    unfiltered = trainer_logps(rollout, temperature=1.3)[rollout.seqs.loss_mask]
    assert (rollout.sampler_logps[rollout.seqs.loss_mask] >= unfiltered - 1e-5).all()
    assert (rollout.sampler_logps[rollout.seqs.loss_mask] - unfiltered).max() > 0.1


def test_greedy_is_the_argmax_of_the_full_forward():
    rollout = everyone(temperature=0.0)
    logits = np.asarray(tiny.logits(BASE, tiny.params(BASE), rollout.seqs))
    for b, t in zip(*np.nonzero(rollout.seqs.loss_mask)):
        assert rollout.seqs.tokens[b, t] == logits[b, t - 1].argmax()
    assert not rollout.sampler_logps.any()  # a point mass
    np.testing.assert_array_equal(new(everyone(temperature=0.0, seed=9))[0], new(rollout)[0])


def test_the_cache_holds_what_a_full_forward_computes():
    """prefill and decode by hand, teacher-forced: the logits of every slot, not only of those drawn."""
    config, params = tiny.BASE, tiny.params()
    seqs, nets = tiny.row(np.random.default_rng(1).integers(0, V, 9), left=2), tiny.nets()
    full = np.asarray(tiny.logits(config, params, seqs))[0]
    head = jax.tree.map(lambda x: x[:, :6], (seqs.tokens, seqs.positions, seqs.segment_ids))
    found, cache = tiny.jit(nets.prefill, static_argnums=3)(*head, 11)
    np.testing.assert_allclose(found[0], full[5], atol=2e-5)
    decode = tiny.jit(nets.decode)
    for slot in range(6, 11):
        visible = (jnp.arange(11)[None, :] <= slot) & (jnp.arange(11)[None, :] >= 2)
        found, cache = decode(seqs.tokens[:, slot], seqs.positions[:, slot], jnp.int32(slot), visible, cache)
        np.testing.assert_allclose(found[0], full[slot], atol=2e-5)
    assert jax.tree.leaves(transformer.empty_cache(config, 1, 11))[0].shape == jax.tree.leaves(cache)[0].shape


# --- the same tokens in any company (committed seeds) ---


@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_draws_the_same_alone_and_among_sixteen_and_with_more_padding(seed):
    together, logps = new(everyone(seed=seed))
    for b in (0, 7, 15):
        for width in (6, 11):
            alone, alone_logps = new(generate(prompts([texts()[b]], width, [b]), seed=seed), width)
            np.testing.assert_array_equal(alone[0], together[b])
            np.testing.assert_allclose(alone_logps[0], logps[b], atol=2e-5)
    backwards = new(generate(prompts(list(texts())[::-1], 6, list(range(16))[::-1]), seed=seed))[0]
    np.testing.assert_array_equal(backwards[::-1], together)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), pytest.param((1, 2, 1, 2, 2), marks=pytest.mark.slow)])
def test_eight_devices_draw_what_one_draws(sizes):
    with tiny.uncached():  # make_mesh switches the cache off for good
        mesh = distributed.make_mesh(dict(zip(distributed.AXES, sizes)))
    config = tiny.config(vocab_size=18, layers=1)  # `tensor` divides it
    axes, nets = transformer.logical_axes(config), tiny.nets(config)
    where = sharding.parameter_shardings(mesh, {"policy": axes}, nets.params)
    batch = prompts(list(texts()), 6)
    placed = distributed.to_global(batch, sharding.row_sharding(mesh))
    nets = nets.replace(params=jax.device_put(nets.params, where))
    run = sharding.jit(lambda n, p, k: sampling.generate(n, p, k, iteration=2, **SETTINGS), mesh)
    with tiny.uncached():
        run = run.lower(nets, placed, jax.random.key(0)).compile(tiny.QUICK)
    for seed in (0, 1):
        many = run(nets, placed, jax.random.key(seed))
        one = generate(batch, config=config, seed=seed)
        assert len(many.seqs.tokens.sharding.device_set) == 8
        np.testing.assert_array_equal(many.seqs.tokens, one.seqs.tokens)
        np.testing.assert_allclose(many.sampler_logps, one.sampler_logps, atol=2e-5)


def test_seeds_iterations_and_samples_do_something_and_repeat():
    base = new(everyone())[0]
    np.testing.assert_array_equal(new(generate(prompts(list(texts()), 6)))[0], base)
    batch = prompts(list(texts()), 6)
    for other in (everyone(seed=1), everyone(iteration=3), generate(batch.replace(sample_ids=batch.sample_ids + 1)),
                  generate(batch.replace(prompt_ids=batch.prompt_ids + 16))):
        assert (new(other)[0] != base).any(-1).mean() > 0.8
    assert everyone(iteration=3).version.tolist() == [3] * 16


def test_row_keys_are_a_function_of_four_counters():
    def data(seed, iteration, prompt, sample):
        keys = sampling.row_keys(jax.random.key(seed), iteration, jnp.asarray([prompt, 99]), jnp.asarray([sample, 99]))
        return tuple(jax.random.key_data(keys[0]).tolist())

    counters = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0), (0, 0, 1, 1)]
    assert len({data(*c) for c in counters}) == len(counters)
    swapped = sampling.row_keys(jax.random.key(0), 0, jnp.asarray([99, 1]), jnp.asarray([99, 0]))
    assert tuple(jax.random.key_data(swapped[1]).tolist()) == data(0, 0, 1, 0)


# --- the end of a row ---


@pytest.mark.parametrize(("stops", "pad"), [((3,), 0), ((3, 5, 6), 3), ((), 0)])
def test_a_stop_token_is_kept_and_nothing_after_it(stops, pad):
    """pad may equal the stop token: the end is known by the segment id."""
    rollout = everyone(stop_ids=stops, pad_id=pad)
    free = everyone(stop_ids=())
    ended = 0
    for b in range(16):
        stream = new(free)[0][b].tolist()
        hits = [i for i, token in enumerate(stream) if token in stops]
        length = hits[0] + 1 if hits else N
        ended += bool(hits)
        assert new(rollout)[0][b].tolist() == stream[:length] + [pad] * (N - length)
        for field in (rollout.seqs.segment_ids, rollout.seqs.loss_mask):
            assert field[b, 6:].tolist() == [True] * length + [False] * (N - length)
        assert not rollout.sampler_logps[b, 6 + length :].any()
        start = len(texts()[b])
        assert rollout.seqs.positions[b, 6 : 6 + length].tolist() == list(range(start, start + length))
        assert bool(rollout.truncated[b]) == (not hits)
    assert (ended == 0) == (not stops) and ended < 16


def test_a_stop_token_on_the_last_slot_is_no_truncation():
    free = new(everyone(stop_ids=()))[0]
    b = next(b for b in range(16) if free[b, -1] not in free[b, :-1])  # its last token is drawn there for the first time
    last, row = int(free[b, -1]), prompts([texts()[b]], 6, [b])
    assert not generate(row, stop_ids=(last,)).truncated[0] and generate(row, stop_ids=(V + 1,)).truncated[0]


def test_one_token_is_a_whole_rollout():
    rollout = everyone(max_new_tokens=1)
    np.testing.assert_array_equal(rollout.seqs.tokens[:, 6], new(everyone())[0][:, 0])
    assert rollout.seqs.tokens.shape == (16, 7)
    with pytest.raises(ValueError, match="at least one token"):
        everyone(max_new_tokens=0)


def test_prompt_slots_come_back_as_they_were_and_loss_positions_are_the_new_ones():
    batch, rollout = prompts(list(texts()), 6), everyone()
    for field in ("tokens", "positions", "segment_ids"):
        np.testing.assert_array_equal(getattr(rollout.seqs, field)[:, :6], getattr(batch, field))
    assert not rollout.seqs.loss_mask[:, :6].any()
    assert (rollout.seqs.loss_positions == np.arange(6, 6 + N)).all()
    for field in ("prompt_ids", "sample_ids", "group_ids"):
        np.testing.assert_array_equal(getattr(rollout, field), getattr(batch, field))


def test_filler_rows_stay_empty_and_disturb_nobody():
    rows = [texts()[0], (), texts()[1], ()]
    rollout = generate(prompts(rows, 6, [0, 0, 1, 0]))
    assert rollout.real.tolist() == [True, False, True, False]
    for b in (1, 3):
        assert not rollout.seqs.segment_ids[b].any() and not rollout.seqs.loss_mask[b].any() and not rollout.truncated[b]
        assert not rollout.sampler_logps[b].any() and not rollout.seqs.tokens[b].any()
    np.testing.assert_array_equal(new(rollout)[0][[0, 2]], new(everyone())[0][:2])
    assert np.isfinite(trainer_logps(rollout)).all()


# --- the draw ---

LOGITS = np.array([2.0, 1.5, 1.5, 0.3, -1.0, -np.inf, 0.3], np.float32)


def draw(logits, keys, *, temperature=1.0, top_k=0, top_p=1.0):
    """Without filters of a list: tokens and log-probs."""
    picked, _ = sampling.pick(logits, keys, State(), temperature=temperature, top_k=top_k, top_p=top_p, filters=sampling.NONE)
    return picked.token, picked.logp


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.6), (1.5, 4, 0.85), (1.0, 1, 1.0)],
)
def test_frequencies_are_the_filtered_probabilities(temperature, top_k, top_p):
    """χ² of 40 000 draws, at a level of 1e-4; what has no probability is never drawn."""
    draws = 40_000
    keys = jax.random.split(jax.random.key(11), draws)
    logits = jnp.broadcast_to(LOGITS, (draws, len(LOGITS)))
    tokens, logps = tiny.jit(functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p))(logits, keys)
    exact = distribution(LOGITS, temperature, top_k, top_p)
    counts = np.bincount(tokens, minlength=len(LOGITS))
    assert not counts[exact == 0].any()
    live = exact > 0
    statistic = ((counts[live] - draws * exact[live]) ** 2 / (draws * exact[live])).sum()
    freedom = live.sum() - 1
    # Upper 1e-4 points of χ² for 0 … 5 degrees of freedom.
    assert statistic <= [1e-9, 15.14, 18.42, 21.11, 23.51, 25.74][freedom], (counts / draws, exact)
    np.testing.assert_allclose(logps, np.log(exact[np.asarray(tokens)]), atol=1e-5)


def test_a_banned_token_is_never_drawn_however_unlikely_the_legal_ones():
    """Banned at both ends and between; an inverse-CDF draw would fall on one of them where u is 0 or rounds to 1."""
    logits = jnp.asarray([-jnp.inf, -200.0, -jnp.inf, -218.0, -jnp.inf], jnp.float32)
    draws = 200_000
    run = tiny.jit(draw)
    tokens, logps = run(jnp.broadcast_to(logits, (draws, 5)), jax.random.split(jax.random.key(2), draws))
    assert set(np.unique(tokens)) <= {1, 3} and np.isfinite(logps).all()
    only, _ = run(jnp.broadcast_to(logits.at[1].set(-jnp.inf), (64, 5)), jax.random.split(jax.random.key(2), 64))
    assert (np.asarray(only) == 3).all()


def test_wrong_shapes_are_refused():
    keys = jax.random.split(jax.random.key(0), 2)
    batch = prompts([texts()[0], texts()[1]], 6)
    bad = [
        lambda: draw(jnp.zeros(5), keys),
        lambda: draw(jnp.zeros((2, 3, 5)), keys),
        lambda: draw(jnp.zeros((2, 5)), keys[0]),
        lambda: sampling.row_keys(keys[0], 0, jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 1), jnp.int32)),
        lambda: sampling.row_keys(keys[0], 0, jnp.zeros(2, jnp.int32), jnp.zeros(3, jnp.int32)),
        lambda: sampling.generate(tiny.nets(BASE), batch.replace(tokens=batch.tokens[0]), keys[0], iteration=0, **SETTINGS),
        lambda: sampling.generate(tiny.nets(BASE), batch.replace(prompt_ids=batch.tokens), keys[0], iteration=0, **SETTINGS),
    ]
    for call in bad:
        with pytest.raises(AssertionError):
            call()
