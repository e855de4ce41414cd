"""Every second row from an opponent: the reference, of an architecture of its own, or its mixture with the policy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import distributed, sampling, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import Networks, NetworkSpec, transformer
from rlhf_jax.objectives import nash_md, xpo
from tests.models import tiny
from tests.sampling.test_sampler import SETTINGS, prompts, texts

VOCABULARY, WIDTH, N, MIXTURE = 18, 6, 8, 0.4  # 18: `tensor` divides it
POLICY = tiny.config(vocab_size=VOCABULARY, layers=1)
OTHER = tiny.config(vocab_size=VOCABULARY, layers=1, kv_heads=4, mlp=16)  # the reference's own architecture
TEMPERATURE = {"reference": 1.0, "mixture": 0.7}
OPPONENTS = {"reference": xpo.opponent, "mixture": functools.partial(nash_md.opponent, mixture=MIXTURE)}
HOW = {**SETTINGS, "max_new_tokens": N, "iteration": 2}


def nets(who: str = "reference") -> Networks:
    spec = NetworkSpec(policy=POLICY, ref=OTHER, temperature=TEMPERATURE[who])
    return Networks({"policy": tiny.params(POLICY)}, {"ref": tiny.params(OTHER, 7)}, spec)


def batch() -> Any:
    """Sixteen rows, two samples of each of eight prompts, the last prompt filler."""
    made = prompts([text for text in (*texts()[:7], ()) for _ in range(2)], WIDTH, [b // 2 for b in range(16)])
    return made.replace(sample_ids=jnp.arange(16, dtype=jnp.int32) % 2)


@functools.partial(tiny.jit, static_argnums=0)
def roll(who: str, networks: Networks, rows: Any) -> Any:
    """The rollout of both, of the policy alone and of the opponent alone."""
    settings, key = {**HOW, "temperature": TEMPERATURE[who]}, jax.random.key(0)
    opponent = OPPONENTS[who](networks)
    both = sampling.generate_against(networks, opponent, rows, key, **settings)
    return both, *(sampling.generate(drawer, rows, key, **settings) for drawer in (networks, opponent))


@functools.cache
def rolled(who: str) -> Any:
    return jax.tree.map(np.asarray, roll(who, nets(who), batch()))


def log_softmax(z: Any) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jnp.asarray(z)), np.float64)


@pytest.mark.parametrize("who", OPPONENTS)
def test_a_row_draws_what_it_draws_among_rows_of_its_own_drawer(who: str) -> None:
    both, policy, opponent = rolled(who)
    for start, alone in ((0, policy), (1, opponent)):
        np.testing.assert_array_equal(both.seqs.tokens[start::2], alone.seqs.tokens[start::2])
        np.testing.assert_allclose(both.sampler_logps[start::2], alone.sampler_logps[start::2], atol=2e-5)
    assert (policy.seqs.tokens[1::2] != opponent.seqs.tokens[1::2]).any(-1)[:7].mean() > 0.5
    for field in ("prompt_ids", "sample_ids", "group_ids"):
        np.testing.assert_array_equal(getattr(both, field), getattr(batch(), field))
    assert both.real.tolist() == [True] * 14 + [False] * 2 and both.version.tolist() == [2] * 16
    assert (both.seqs.loss_positions == np.arange(WIDTH, WIDTH + N)).all()


@pytest.mark.parametrize("who", OPPONENTS)
def test_sampler_log_probs_are_those_of_whoever_drew(who: str) -> None:
    both, _, _ = rolled(who)
    read = tiny.jit(lambda networks, seqs: (networks.policy(seqs).logps, networks.ref(seqs).logps))
    policy, reference = (np.asarray(x) for x in read(nets(who), both.seqs))
    z = [np.asarray(tiny.logits(config, tiny.params(config, seed), both.seqs)) / TEMPERATURE[who] for config, seed in ((POLICY, 0), (OTHER, 7))]
    mixed = log_softmax((1 - MIXTURE) * log_softmax(z[0]) + MIXTURE * log_softmax(z[1]))  # of the distributions at this temperature
    own, drawn = both.seqs.loss_mask, both.sampler_logps
    assert own[1::2].sum() > N
    for b, t in zip(*np.nonzero(own)):
        opponent = reference[b, t] if who == "reference" else mixed[b, t - 1, both.seqs.tokens[b, t]]
        assert abs(drawn[b, t] - (opponent if b % 2 else policy[b, t])) < 5e-5, (b, t)
    assert np.abs(drawn - policy)[1::2][own[1::2]].max() > 0.1


def test_the_mixtures_first_token_is_drawn_with_its_probability() -> None:
    """χ² of 8000 samples of one prompt, at a level of 1e-4."""
    draws = 8000
    row = jax.tree.map(lambda x: jnp.broadcast_to(x, (draws, *x.shape[1:])), prompts([texts()[2]], WIDTH))
    row = row.replace(sample_ids=jnp.arange(draws, dtype=jnp.int32))
    draw = tiny.jit(lambda networks, rows: sampling.generate(nash_md.opponent(networks, mixture=MIXTURE), rows, jax.random.key(3),
                                                             **{**HOW, "max_new_tokens": 1}).seqs.tokens[:, WIDTH])
    counts = np.bincount(np.asarray(draw(nets(), row)), minlength=VOCABULARY)
    seqs = tiny.row(texts()[2])
    z = [np.asarray(tiny.logits(config, tiny.params(config, seed), seqs))[0, -1] for config, seed in ((POLICY, 0), (OTHER, 7))]
    exact = np.exp(log_softmax((1 - MIXTURE) * z[0] + MIXTURE * z[1]))
    likely = exact * draws >= 5
    observed, expected = (np.append(x[likely], x[~likely].sum()) for x in (counts, exact * draws))
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    assert statistic < 46.0, (counts, exact * draws)  # the upper 1e-4 point of χ² with 17 degrees of freedom
    policy = np.exp(log_softmax(z[0]))[likely] * draws
    assert ((counts[likely] - policy) ** 2 / policy).sum() > 200.0


COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize("sizes", [(8, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_eight_devices_draw_what_one_draws(sizes: tuple[int, int, int]) -> None:
    """And where only rows are split, no device asks another for anything: pairs are neighbours on one device."""
    with tiny.uncached():  # make_mesh switches the cache off for good
        mesh = distributed.make_mesh(dict(zip(distributed.AXES, sizes)))
    networks, where = nets("mixture"), {}
    for name, config, tree in (("policy", POLICY, networks.params), ("ref", OTHER, networks.frozen)):
        where[name] = sharding.parameter_shardings(mesh, {name: transformer.logical_axes(config)}, tree)
    networks = networks.replace(params=jax.device_put(networks.params, where["policy"]), frozen=jax.device_put(networks.frozen, where["ref"]))
    placed = distributed.to_global(batch(), sharding.row_sharding(mesh))
    how = {**HOW, "temperature": TEMPERATURE["mixture"]}
    run = sharding.jit(
        lambda n, p: sampling.generate_against(n, OPPONENTS["mixture"](n), p, jax.random.key(0), **how), mesh)
    with tiny.uncached():
        run = run.lower(networks, placed).compile(tiny.QUICK)
    many, (one, _, _) = run(networks, placed), rolled("mixture")
    assert len(many.seqs.tokens.sharding.device_set) == 8
    np.testing.assert_array_equal(many.seqs.tokens, one.seqs.tokens)
    np.testing.assert_allclose(many.sampler_logps, one.sampler_logps, atol=2e-5)
    if sizes == (8, 1, 1):
        assert [name for name in COLLECTIVES if name in run.as_text()] == []


def test_a_reference_that_shares_frozen_layers_draws_as_it_reads() -> None:
    """Without a configuration of its own it is the policy's frozen part with its own copy of what trains."""
    params, seqs = tiny.params(POLICY), tiny.rows(4, 9, vocabulary=VOCABULARY)
    base, trained, copy = {"layers": params["layers"]}, {"ends": params["ends"]}, {"ends": tiny.params(POLICY, 5)["ends"]}
    networks = Networks({"policy": trained}, {"base": {"policy": base}, "ref": copy}, NetworkSpec(policy=POLICY, temperature=0.8))
    read = tiny.jit(lambda n: (n.as_reference().policy(seqs).logps, n.ref(seqs).logps, n.policy(seqs).logps))
    found, expected, policy = (np.asarray(x) for x in read(networks))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - policy).max() > 0.1


def test_a_reference_that_says_what_the_policy_cannot_read_is_refused() -> None:
    larger = tiny.config(vocab_size=VOCABULARY + 1, layers=1)
    networks = Networks({"policy": tiny.params(POLICY)}, {"ref": tiny.params(larger)}, NetworkSpec(policy=POLICY, ref=larger))
    with pytest.raises(UserError, match=r"config\.reference_from.*19 entries exceeds config\.model\.vocab_size = 18"):
        networks.as_reference()


def test_an_odd_number_of_rows_is_refused() -> None:
    odd = jax.tree.map(lambda x: x[:3], batch())
    with pytest.raises(AssertionError):
        sampling.generate_against(nets(), xpo.opponent(nets()), odd, jax.random.key(0), **HOW)
