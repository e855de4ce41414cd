"""Online DPO, XPO and Nash-MD: what makes a pair, what a tie is, what they reduce to, and the gradient of a game by enumeration."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import _online_pairs, nash_md, xpo
from rlhf_jax.objectives._opponents import Mixture
from rlhf_jax.objectives.ipo import ipo_loss
from rlhf_jax.types import Comparisons, Rollout, Sequences
from tests.objectives import tabular
from tests.objectives.settings import config, moved

V = 4
NAMES = {"online_dpo": "dpo", "online_ipo": "ipo", "xpo": "dpo", "nash_md": "policy"}  # with the term that counts pairs


@functools.cache
def bind(name: str, **changes: float) -> Any:
    return objectives.bind(config(name, **changes))


def case(rows: int = 8, *, scores: Any = None, filler: bool = False, seed: int = 0) -> tuple[tabular.TabularNets, Rollout]:
    """Networks that have moved, and a rollout in pairs, nothing truncated."""
    rng = np.random.default_rng(seed)
    fake = tabular.nets(rng, V)
    batch = tabular.rollout(rng, rows, 8, V, filler=filler).replace(truncated=jnp.zeros(rows, bool))
    batch = batch if scores is None else batch.replace(scores=jnp.asarray(scores, jnp.float32))
    return moved(fake, rng), tabular.with_reference(fake, batch)


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


# --- pairs ---


def test_the_higher_score_comes_first_and_equal_ones_are_a_tie() -> None:
    _, batch = case(scores=[1, 2, 2, 1, 3, 3, 0, 1])
    seqs, scores = _online_pairs.paired(batch, missing_eos_penalty=0.0)
    pairs = _online_pairs.judge(seqs, scores, opponent=True)
    rows = np.asarray(batch.seqs.tokens)
    np.testing.assert_array_equal(pairs.seqs.tokens, [rows[[1, 0]], rows[[2, 3]], rows[[4, 5]], rows[[7, 6]]])
    np.testing.assert_array_equal(pairs.own, [[False, True], [True, False], [True, False], [False, True]])
    np.testing.assert_array_equal(pairs.tied, [False, False, True, False])
    np.testing.assert_array_equal(pairs.preferences.real, [True, True, False, True])
    assert pairs.real.all() and _online_pairs.judge(seqs, scores, opponent=False).own.all()


def test_a_pair_with_an_unknown_score_is_filler() -> None:
    """NaN stands for a completion that the reward could not judge."""
    fake, batch = case(scores=[1, 2, 2, 1, np.nan, 3, 0, 1])
    for name in NAMES:
        prepared, _, metrics = tabular.prepare(bind(name), fake, batch)
        assert prepared.real.tolist() == [True, True, False, True]
        without, _, _ = tabular.prepare(bind(name), fake, jax.tree.map(lambda x: x[np.array([0, 1, 2, 3, 6, 7])], batch))
        close(tabular.objective(bind(name), fake, prepared), tabular.objective(bind(name), fake, without))
        assert all(np.isfinite(m.compute()) for m in metrics.values())
        contested = name in ("xpo", "nash_md")
        np.testing.assert_allclose(metrics["objective/score"].compute(), 3 / 3 if contested else 10 / 7, rtol=1e-6)
        assert float(metrics["rollout/unscored"].compute()) == 1 / 8


def test_a_pair_with_a_filler_row_is_filler() -> None:
    fake, batch = case(filler=True)
    for name, term in NAMES.items():
        prepared, _, metrics = tabular.prepare(bind(name), fake, batch)
        assert prepared.real.tolist() == [True, True, True, False]
        assert float(tabular.loss(bind(name), fake, prepared)[0][term].count) == 3
        assert float(metrics.get("rollout/ties", metrics.get("objective/preference")).count) == 3


def test_a_truncated_sample_pays_the_penalty_before_it_is_judged() -> None:
    fake, batch = case(2, scores=[1.0, 0.5])
    batch = batch.replace(truncated=jnp.array([True, False]))
    for penalty, first in ((0.0, 0), (0.6, 1)):
        prepared, _, metrics = tabular.prepare(bind("online_dpo", missing_eos_penalty=penalty), fake, batch)
        np.testing.assert_array_equal(prepared.seqs.tokens[0, 0], batch.seqs.tokens[first])
        assert float(metrics["objective/score"].compute()) == 0.75
        duels, _, _ = tabular.prepare(bind("nash_md", missing_eos_penalty=penalty), fake, batch)
        np.testing.assert_allclose(duels.preference, [1 / (1 + np.exp(penalty - 0.5))], rtol=1e-6)


def test_an_odd_number_of_rows_and_other_shapes_are_refused() -> None:
    _, batch = case(3)
    calls = [
        lambda: _online_pairs.neighbours(batch),
        lambda: _online_pairs.judge(tabular.sequences(np.random.default_rng(0), (2, 2, 8), V), jnp.ones(2), opponent=True),
        lambda: xpo.optimism(jnp.ones((2, 1)), alpha=0.1),
        lambda: Mixture(None, None, 0.5).prefill(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 2)), 4),
        lambda: Mixture(None, None, 0.5).decode(jnp.ones(2), jnp.ones((2, 1)), jnp.int32(0), jnp.ones((2, 3), bool), None),
        lambda: nash_md.preference_loss(jnp.ones(2), jnp.ones(1)),
        lambda: nash_md.kl_loss(jnp.ones(2), jnp.ones(1), tau=0.1),
        lambda: nash_md.token_kl_loss(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((2, 3), bool), tau=0.1),
    ]
    for call in calls:
        with pytest.raises(AssertionError):
            call()


# --- what they reduce to ---


@pytest.mark.parametrize(("name", "offline"), [
    ("online_dpo", {"name": "dpo", "beta": 0.1}), ("online_ipo", {"name": "ipo", "tau": 0.4, "reduction": "sum"}),
])
def test_online_it_is_the_offline_objective_on_the_judged_pairs(name: str, offline: dict[str, Any]) -> None:
    fake, batch = case(scores=[1, 2, 5, 4, 0, 1, 3, 2])
    order = np.array([[1, 0], [2, 3], [5, 4], [6, 7]])
    pairs = Comparisons(seqs=jax.tree.map(lambda x: x[order], batch.seqs))
    prepared, _, _ = tabular.prepare(bind(name), fake, batch)
    other = objectives.bind(offline)
    close(tabular.objective(bind(name), fake, prepared), tabular.objective(other, fake, pairs))
    found, expected = (tabular.loss(*call)[1] for call in ((bind(name), fake, prepared), (other, fake, pairs)))
    close({metric: found[metric] for metric in expected}, expected)


def test_xpo_without_optimism_is_online_dpo_and_optimism_lowers_the_references_samples_whoever_won() -> None:
    fake, batch = case(scores=[1, 2, 5, 4, 0, 0, 3, 2])
    plain, bold = bind("xpo", alpha=0.0), bind("xpo", alpha=0.7)
    prepared, _, metrics = tabular.prepare(plain, fake, batch)
    close(tabular.objective(plain, fake, prepared), tabular.objective(bind("online_dpo"), fake, tabular.prepare(bind("online_dpo"), fake, batch)[0]))
    terms, _ = tabular.loss(bold, fake, prepared)
    odd = np.asarray(jnp.where(batch.seqs.loss_mask, fake.policy(batch.seqs).logps, 0.0).sum(-1))[1::2]
    np.testing.assert_allclose(terms["optimism"].compute(), 0.7 * odd.mean(), rtol=1e-5)  # the tied pair's among them
    assert float(metrics["objective/preference"].compute()) == (0 + 1 + 0.5 + 1) / 4
    np.testing.assert_allclose(metrics["objective/score"].compute(), (1 + 5 + 0 + 3) / 4)
    np.testing.assert_allclose(metrics["objective/opponent_score"].compute(), (2 + 4 + 0 + 2) / 4)


@pytest.mark.parametrize("name", ["online_dpo", "online_ipo", "xpo"])
def test_a_tie_is_counted_and_gives_no_gradient(name: str) -> None:
    """And the pairs told apart keep their weight: as much as if the tied ones had been told apart with no gradient."""
    bound = bind(name, **({"alpha": 0.0} if name == "xpo" else {}))
    fake, batch = case(4, scores=[1, 1, 2, 0])
    prepared, _, metrics = tabular.prepare(bound, fake, batch)
    assert (float(metrics["rollout/ties"].total), float(metrics["rollout/ties"].count)) == (1.0, 2.0)
    half, slopes = tabular.objective(bound, fake, prepared)
    alone, _, _ = tabular.prepare(bound, fake, jax.tree.map(lambda x: x[2:], batch))
    close((2 * half, jax.tree.map(lambda g: 2 * g, slopes)), tabular.objective(bound, fake, alone))
    assert float(tabular.loss(bound, fake, prepared)[1]["reward/accuracy"].count) == 1
    tied, _, _ = tabular.prepare(bound, fake, batch.replace(scores=jnp.ones(4)))
    value, slopes = tabular.objective(bound, fake, tied)
    assert float(value) == 0.0 and not np.asarray(slopes["policy"]).any()


def test_nash_md_at_the_reference_moves_by_the_preference_alone_and_even_odds_move_nothing() -> None:
    rng = np.random.default_rng(1)
    fake = tabular.nets(rng, V, moved=0.0)
    batch = tabular.with_reference(fake, tabular.rollout(rng, 4, 8, V))
    bound = bind("nash_md", missing_eos_penalty=0.0)
    even, _, metrics = tabular.prepare(bound, fake, batch.replace(scores=jnp.full(4, 0.3)))
    value, slopes = tabular.objective(bound, fake, even)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(slopes["policy"], 0.0, atol=1e-6)
    assert float(metrics["objective/preference"].compute()) == 0.5
    won, _, _ = tabular.prepare(bound, fake, batch.replace(scores=jnp.array([50.0, 0.0, 50.0, 0.0])))
    logps, _ = tabular.loss(bound, fake, won)
    own = np.asarray(jnp.where(batch.seqs.loss_mask, fake.policy(batch.seqs).logps, 0.0).sum(-1))[::2]
    np.testing.assert_allclose(logps["policy"].compute(), -0.5 * own.mean(), rtol=1e-5)
    np.testing.assert_allclose(logps["kl"].compute(), 0.0, atol=1e-6)


# --- the game, by enumeration ---


def responses(length: int) -> Sequences:
    """Every response of `length` tokens to the prompt 0."""
    tokens = jnp.asarray([(0, *tail) for tail in itertools.product(range(3), repeat=length)], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length + 1, dtype=jnp.int32), tokens.shape)
    return Sequences(tokens=tokens, positions=positions, segment_ids=jnp.ones_like(tokens), loss_mask=positions > 0)


@pytest.mark.parametrize("length", [1, 2])
def test_nash_mds_expected_gradient_is_that_of_the_regularised_game(length: int) -> None:
    """−P(π ≻ π') + τ KL(π ‖ π_ref) over all responses, π' held fixed. TRL's form agrees for one token, and for two it does not."""
    rng, tau = np.random.default_rng(2), 0.4
    fake, seqs = moved(tabular.nets(rng, 3), rng, 0.5), responses(length)
    reward = jnp.asarray(rng.normal(size=len(seqs.tokens)), jnp.float32)
    ref, other = fake.ref(seqs).logps, jax.nn.softmax(jnp.asarray(rng.normal(size=len(reward)), jnp.float32))
    preferred = jax.nn.sigmoid(reward[:, None] - reward[None, :]) @ other  # P(y ≻ π')

    def logps(params: Any) -> Any:
        return fake.replace(params=params).policy(seqs).logps

    def game(params: Any) -> Any:
        total = logps(params).sum(-1)
        return (jnp.exp(total) * (-preferred + tau * (total - ref.sum(-1)))).sum()

    weights = jnp.exp(logps(fake.params).sum(-1))  # y ~ π, as data

    def surrogate(params: Any, kl: Any) -> Any:
        new = logps(params)
        return (weights * (nash_md.preference_loss(new.sum(-1), preferred) + kl(new))).sum()

    def sequence(new: Any) -> Any:
        return nash_md.kl_loss(new.sum(-1), ref.sum(-1), tau=tau)

    def tokens(new: Any) -> Any:
        return nash_md.token_kl_loss(new, ref, seqs.loss_mask, tau=tau)

    expected = jax.jit(jax.grad(game))(fake.params)["policy"]
    slope = jax.jit(jax.grad(surrogate), static_argnums=1)
    np.testing.assert_allclose(slope(fake.params, sequence)["policy"], expected, rtol=1e-4, atol=1e-6)
    gap = np.abs(slope(fake.params, tokens)["policy"] - expected).max()
    assert gap < 1e-6 if length == 1 else gap > 1e-3


def test_online_ipos_expected_gradient_is_that_of_self_play() -> None:
    """4/τ times Nash-MD's with m = 0, over all pairs and both verdicts; Calandriello et al. 2024, proposition 4.2."""
    rng, tau = np.random.default_rng(5), 0.4
    fake, seqs = moved(tabular.nets(rng, 3), rng, 0.5), responses(2)
    count = len(seqs.tokens)
    reward = jnp.asarray(rng.normal(size=count), jnp.float32)
    ref, verdict = fake.ref(seqs).logps.sum(-1), jax.nn.sigmoid(reward[:, None] - reward[None, :])  # P(y ≻ y')
    weights = jnp.exp(fake.policy(seqs).logps.sum(-1))  # y, y' ~ π, as data
    one, two = (index.ravel() for index in jnp.meshgrid(jnp.arange(count), jnp.arange(count), indexing="ij"))

    def contrast(params: Any) -> Any:
        ratios = fake.replace(params=params).policy(seqs).logps.sum(-1) - ref
        won, lost = ipo_loss(ratios[one], ratios[two], tau=tau), ipo_loss(ratios[two], ratios[one], tau=tau)
        return (weights[one] * weights[two] * (verdict[one, two] * won + verdict[two, one] * lost)).sum()

    def self_play(params: Any) -> Any:
        logps = fake.replace(params=params).policy(seqs).logps.sum(-1)
        return (weights * (nash_md.preference_loss(logps, verdict @ weights) + nash_md.kl_loss(logps, ref, tau=tau))).sum()

    found, expected = (jax.jit(jax.grad(f))(fake.params)["policy"] for f in (contrast, self_play))
    np.testing.assert_allclose(found, 4 / tau * expected, rtol=1e-4, atol=1e-5)


# --- opponents ---


class Table:
    """Draws from one row of logits, whatever came before."""

    def __init__(self, logits: Any) -> None:
        self.logits = jnp.asarray(logits)

    def prefill(self, tokens: Any, positions: Any, segment_ids: Any, slots: int) -> Any:
        return self.logits, {"drawn": jnp.int32(0)}

    def decode(self, token: Any, position: Any, slot: Any, visible: Any, cache: Any) -> Any:
        return self.logits + cache["drawn"], {"drawn": cache["drawn"] + 1}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("mixture", [0.0, 0.3, 1.0])
def test_a_mixture_is_the_normalised_product_of_the_tempered_distributions(mixture: float, temperature: float) -> None:
    rng = np.random.default_rng(3)
    one, two = (rng.normal(size=(2, V)).astype(np.float32) * 2 + shift for shift in (0.0, 40.0))
    mixed = Mixture(Table(one), Table(two), mixture)
    rows, token = jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32)
    logits, cache = mixed.prefill(rows, rows, rows, 5)
    first, second = (np.exp(np.asarray(z, np.float64) / temperature) for z in (one, two))
    product = (first / first.sum(-1, keepdims=True)) ** (1 - mixture) * (second / second.sum(-1, keepdims=True)) ** mixture
    np.testing.assert_allclose(jax.nn.softmax(logits / temperature), product / product.sum(-1, keepdims=True), rtol=2e-5)
    for _ in range(2):  # each network's cache goes back to it
        again, cache = mixed.decode(token, token, jnp.int32(3), rows, cache)
    assert [int(c["drawn"]) for c in cache] == [2, 2]
    np.testing.assert_allclose(again, logits + 1, rtol=1e-5)


def test_networks_over_other_vocabularies_do_not_mix() -> None:
    rows = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(UserError, match=r"config\.reference_from.*5 entries and config\.model\.vocab_size is 4"):
        Mixture(Table(jnp.zeros((2, 4))), Table(jnp.zeros((2, 5))), 0.5).prefill(rows, rows, rows, 5)


@pytest.mark.parametrize(("name", "rate", "changes", "share"), [
    ("xpo", 10.0, {"alpha": 1e-3}, 1.0), ("nash_md", 20.0, {"tau": 0.008, "mixture": 0.75}, 0.75),
])
def test_against_its_opponent_the_policy_comes_to_win(name: str, rate: float, changes: dict[str, float], share: float) -> None:
    """Rows 0, 2, 4 … are the policy's, the others of a policy that is the reference to a share: the policy ends by being preferred."""
    bound, start = bind(name, missing_eos_penalty=0.0, **changes), tabular.nets(np.random.default_rng(4), V, moved=0.0)

    @jax.jit
    def iterate(params: Any, key: Any) -> Any:
        nets = start.replace(params=params)
        other = start.replace(params={"policy": (1 - share) * params["policy"] + share * start.frozen["ref"]})
        rows = [tabular.sample(drawer, k, 32, 6) for drawer, k in zip((nets, other), jax.random.split(key))]
        seqs = jax.tree.map(lambda a, b: jnp.stack([a, b], 1).reshape(-1, a.shape[-1]), *rows)
        batch = tabular.with_reference(start, tabular.scored(seqs, 2.0 * (seqs.tokens == 1).sum(-1), group=2))
        batch, _, metrics = bound.prepare(nets, batch, {}, key)
        slopes = jax.grad(lambda p: tabular.value(bound.loss(start.replace(params=p), batch, None)[0]))(params)
        found = jnp.stack([metrics[f"objective/{what}"].compute() for what in ("score", "opponent_score", "preference")])
        return jax.tree.map(lambda p, g: p - rate * g, params, slopes), found

    params, found = start.params, []
    for step in range(25):
        params, metrics = iterate(params, jax.random.key(step))
        found.append(metrics)
    score, opponent, preference = np.array(found).T
    assert score[-5:].mean() > score[:2].mean() + 2.0, score
    assert score[-5:].mean() > opponent[-5:].mean() + 1.0, opponent
    assert preference[-5:].mean() > 0.6 and abs(preference[0] - 0.5) < 0.2, preference
