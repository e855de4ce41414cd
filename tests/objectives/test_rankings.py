"""Plackett–Luce, ratings and steps: special cases by hand, absent responses, where a score is read, and what training moves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.objectives import plackett_luce, pointwise, process_reward, reward
from rlhf_jax.types import Comparisons
from tests import reference
from tests.objectives import tabular
from tests.objectives.settings import bound
from tests.reference.numeric import gradient

V = 5


def rankings(rng, rows, branches, length=7, filler=True):
    """Rankings of 2 to K responses; what stands in the empty branches, tokens and loss mask, is random."""
    seqs = tabular.sequences(rng, (rows, branches, length), V)
    kept = jnp.arange(branches)[None] < jnp.asarray(rng.integers(2, branches + 1, rows))[:, None]
    kept = kept & (jnp.arange(rows)[:, None] < rows - filler)
    return Comparisons(seqs=seqs.replace(segment_ids=seqs.segment_ids * kept[..., None]))


@pytest.mark.parametrize("branches", [3, 4])
def test_rankings_of_several_lengths(branches):
    """Against NumPy from the paper, which sees the responses that are there alone."""
    rng = np.random.default_rng(branches)
    fake, batch = tabular.nets(rng, V), rankings(rng, 6, branches)
    assert len(set(batch.seqs.real.sum(-1).tolist())) > 2
    table = tabular.float64(fake)[0]["reward"]
    case = reference.Case(old={}, at={}, ref=None, batch=tabular.as_numpy(batch), h={}, carry=None)
    slow = reference.find("plackett_luce")
    value, slopes = tabular.objective(bound("plackett_luce"), fake, batch)
    np.testing.assert_allclose(value, slow({"reward": table}, case), rtol=1e-5)
    np.testing.assert_allclose(slopes["reward"], gradient(lambda t: slow({"reward": t}, case), table), rtol=1e-3, atol=1e-4)


def test_empty_branches_at_the_end_change_nothing():
    rng = np.random.default_rng(1)
    fake, batch = tabular.nets(rng, V), rankings(rng, 5, 3)
    more = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :1]], axis=1), batch)
    more = more.replace(seqs=more.seqs.replace(segment_ids=more.seqs.segment_ids.at[:, 3:].set(0)))
    assert more.real.tolist() == batch.real.tolist() == [True] * 4 + [False]
    results = [(tabular.objective(bound("plackett_luce"), fake, b), tabular.loss(bound("plackett_luce"), fake, b)) for b in (batch, more)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), *results)


def test_two_responses_are_bradley_terry():
    rng = np.random.default_rng(2)
    fake, batch = tabular.nets(rng, V), tabular.comparisons(rng, 6, 8, V, filler=True)
    plain = objectives.bind({"name": "reward", "center_coef": 0.0})
    found, expected = (tabular.objective(one, fake, batch) for one in (bound("plackett_luce"), plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)
    found, expected = (tabular.loss(one, fake, batch)[1] for one in (bound("plackett_luce"), plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)
    rewards = jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)
    pair = reward.bradley_terry_loss(rewards[:, 0], rewards[:, 1], jnp.zeros(4))
    np.testing.assert_allclose(plackett_luce.plackett_luce_loss(rewards, jnp.ones((4, 2), bool)), pair, rtol=1e-5)


def test_plackett_luce_is_a_distribution_over_orders():
    """The probabilities of all orders of four responses sum to one; equal rewards make each 1 / 4!; a constant changes nothing."""
    rewards = jnp.array([0.3, -1.2, 2.0, 0.7])
    orders = jnp.array(list(itertools.permutations(range(4))))
    present = jnp.ones(orders.shape, bool)
    losses = plackett_luce.plackett_luce_loss(rewards[orders], present)
    np.testing.assert_allclose(jnp.exp(-losses).sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(plackett_luce.plackett_luce_loss(rewards[orders] + 30.0, present), losses, rtol=1e-4)
    np.testing.assert_allclose(plackett_luce.plackett_luce_loss(jnp.zeros(orders.shape), present), np.log(24.0), rtol=1e-6)


def test_absent_and_extreme_rewards_are_finite():
    rewards, present = jnp.array([[500.0, -500.0, jnp.nan], [-500.0, 500.0, jnp.inf]]), jnp.array([[True, True, False]] * 2)
    f = lambda r: plackett_luce.plackett_luce_loss(r, present).sum()  # noqa: E731
    np.testing.assert_allclose(plackett_luce.plackett_luce_loss(rewards, present), [0.0, 1000.0], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(f)(rewards), [[0, 0, 0], [-1, 1, 0]], atol=1e-6)


def test_accuracy_counts_every_pair_of_a_ranking():
    present = jnp.array([[True, True, True], [True, True, False]])
    metrics = plackett_luce.ranking_metrics(jnp.array([[3.0, 1.0, 2.0], [1.0, 1.0, 9.0]]), present)
    assert {name: (float(m.total), float(m.count)) for name, m in metrics.items()} == {
        "reward/chosen": (4.0, 2.0), "reward/rejected": (4.0, 3.0), "reward/margin": (2.0, 4.0), "reward/accuracy": (2.5, 4.0),
    }


def test_overfit_an_order_of_four():
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=V)
    seqs = tabular.sequences(rng, (16, 4, 8), V)
    gold = (hidden[np.asarray(seqs.tokens)] * (np.asarray(seqs.segment_ids) != 0)).sum(-1)
    order = jnp.asarray(np.argsort(-gold, axis=1))[..., None]
    batch = Comparisons(seqs=jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=1), seqs))
    fake = tabular.TabularNets({"reward": jnp.asarray(-hidden, jnp.float32)}, {})  # starts exactly the wrong way round
    accuracy = lambda nets: float(tabular.loss(bound("plackett_luce"), nets, batch)[1]["reward/accuracy"].compute())  # noqa: E731
    assert accuracy(fake) == 0.0
    assert accuracy(tabular.descend(bound("plackett_luce"), fake, batch, steps=200, rate=0.2)) > 0.95


def test_labels_by_hand():
    scores, targets = jnp.array([[2.0, -1.0, 0.0]]), jnp.array([[1.0, 1.0, 0.0]])
    np.testing.assert_allclose(pointwise.squared_error(scores, targets), [[1.0, 4.0, 0.0]])
    np.testing.assert_allclose(process_reward.verdict_loss(scores, targets), [np.log1p(np.exp([-2.0, 1.0, 0.0]))], rtol=1e-6)
    np.testing.assert_allclose(process_reward.verdict_loss(jnp.array([-500.0, 500.0]), jnp.array([1.0, 1.0])), [500.0, 0.0])


@pytest.mark.parametrize("name", ["pointwise", "process_reward"])
def test_a_label_reads_the_score_after_its_token(name):
    """Tokens behind a label do not change its loss, tokens up to it do."""
    rng = np.random.default_rng(4)
    fake, seqs = tabular.nets(rng, V), tabular.sequences(rng, (1, 8), V)
    at = 3
    batch = tabular.labelled(rng, 1, 8, V).replace(seqs=seqs, targets=jnp.ones((1, 8)), weights=jnp.zeros((1, 8)).at[0, at].set(1.0))

    def value(token):
        tokens = seqs.tokens.at[0, token].set((seqs.tokens[0, token] + 1) % V)
        return float(tabular.value(tabular.loss(bound(name), fake, batch.replace(seqs=seqs.replace(tokens=tokens)))[0]))

    before = float(tabular.value(tabular.loss(bound(name), fake, batch)[0]))
    assert value(at + 1) == before != value(at)


def test_steps_are_judged_by_the_sign_of_their_score():
    fake = tabular.TabularNets({"reward": jnp.array([1.0, -2.0, 0.0])}, {})
    rng = np.random.default_rng(5)
    batch = tabular.labelled(rng, 1, 6, 3)
    seqs = batch.seqs.replace(tokens=jnp.array([[0, 1, 0, 0, 0, 2]]), segment_ids=jnp.array([[1, 1, 1, 1, 1, 0]]))
    # The scores are 1, −1, 0, 1, 2, and nothing on the padding.
    batch = batch.replace(seqs=seqs, targets=jnp.array([[1.0, 0, 1, 0, 1, 1]]), weights=jnp.array([[1.0, 1, 1, 1, 0, 1]]))
    metrics = tabular.loss(bound("process_reward"), fake, batch)[1]
    assert {name: (float(m.total), float(m.count)) for name, m in metrics.items()} == {
        "reward/step_accuracy": (2.5, 4.0), "reward/chosen": (1.0, 2.0), "reward/rejected": (0.0, 2.0),
    }


@pytest.mark.parametrize("call", [
    lambda: plackett_luce.plackett_luce_loss(jnp.ones(3), jnp.ones(3, bool)),
    lambda: plackett_luce.plackett_luce_loss(jnp.ones((2, 3)), jnp.ones((2, 1), bool)),
    lambda: plackett_luce.ranking_metrics(jnp.ones((2, 3)), jnp.ones((2, 1), bool)),
    lambda: pointwise.squared_error(jnp.ones((2, 3)), jnp.ones((2, 1))),
    lambda: process_reward.verdict_loss(jnp.ones((2, 3)), jnp.ones(3)),
])  # fmt: skip
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()
