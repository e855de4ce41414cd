"""Bradley–Terry: values, gradients, margin and centring by hand, where the score is read, an overfit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.objectives import reward
from tests.objectives import tabular
from tests.reference import objectives as slow
from tests.reference.numeric import gradient

V = 5


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center_coef", [0.0, 0.5])
def test_value_and_gradient(margin, center_coef):
    rng = np.random.default_rng(0)
    fake, batch = tabular.nets(rng, V), tabular.comparisons(rng, 5, 7, V, filler=True, margin=margin)
    table, numpy = tabular.float64(fake)[0]["reward"], tabular.as_numpy(batch)
    value, slopes = tabular.objective(objectives.bind({"name": "reward", "center_coef": center_coef}), fake, batch)
    np.testing.assert_allclose(value, slow.reward(table, numpy, center_coef), rtol=1e-5)
    np.testing.assert_allclose(slopes["reward"], gradient(lambda t: slow.reward(t, numpy, center_coef), table), rtol=1e-3, atol=1e-4)
    assert not np.asarray(slopes["policy"]).any()


def test_by_hand():
    chosen, rejected = jnp.array([2.0, 50.0]), jnp.array([1.0, -50.0])
    np.testing.assert_allclose(reward.bradley_terry_loss(chosen, rejected, jnp.zeros(2)), [np.log1p(np.exp(-1.0)), 0.0], rtol=1e-6)
    np.testing.assert_allclose(reward.bradley_terry_loss(rejected, chosen, jnp.zeros(2)), [np.log1p(np.exp(1.0)), 100.0], rtol=1e-6)
    np.testing.assert_allclose(reward.bradley_terry_loss(chosen, rejected, jnp.array([1.0, 0.0]))[0], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(reward.centring_loss(chosen, rejected, center_coef=0.1), [0.9, 0.0], rtol=1e-6)


def test_equal_scores_are_half_right():
    rng = np.random.default_rng(0)
    batch = tabular.comparisons(rng, 4, 8, V)
    fake = tabular.TabularNets({"reward": jnp.zeros(V)}, {})
    terms, metrics = tabular.loss(objectives.bind({"name": "reward", "center_coef": 0.0}), fake, batch)
    np.testing.assert_allclose(terms["bradley_terry"].compute(), np.log(2), rtol=1e-6)
    assert float(metrics["reward/accuracy"].compute()) == 0.5 and float(metrics["reward/margin"].compute()) == 0.0


def test_the_order_of_the_pair_flips_the_margin():
    rng = np.random.default_rng(2)
    fake, batch = tabular.nets(rng, V), tabular.comparisons(rng, 6, 8, V)
    bound = objectives.bind({"name": "reward", "center_coef": 0.0})
    there = tabular.loss(bound, fake, batch)[1]
    back = tabular.loss(bound, fake, jax.tree.map(lambda x: x[:, ::-1], batch))[1]
    np.testing.assert_allclose(there["reward/margin"].total, -back["reward/margin"].total, rtol=1e-5)
    np.testing.assert_allclose(there["reward/accuracy"].compute(), 1 - back["reward/accuracy"].compute(), rtol=1e-6)


def test_overfit_the_accuracy_rises():
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=V)
    batch = tabular.comparisons(rng, 32, 8, V)
    numpy = tabular.as_numpy(batch)
    gold = (hidden[numpy.seqs.tokens] * (numpy.seqs.segment_ids != 0)).sum(-1)
    order = jnp.asarray(np.argsort(-gold, axis=1))[..., None]
    batch = batch.replace(seqs=jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=1), batch.seqs))
    fake = tabular.TabularNets({"reward": jnp.asarray(-hidden, jnp.float32)}, {})  # starts exactly the wrong way round
    bound = objectives.bind({"name": "reward", "center_coef": 0.01})
    assert float(tabular.loss(bound, fake, batch)[1]["reward/accuracy"].compute()) == 0.0
    metrics = tabular.loss(bound, tabular.descend(bound, fake, batch, steps=300, rate=0.5), batch)[1]
    assert float(metrics["reward/accuracy"].compute()) > 0.95
    assert float(metrics["reward/chosen"].compute()) > float(metrics["reward/rejected"].compute())


@pytest.mark.parametrize("call", [
    lambda: reward.bradley_terry_loss(jnp.ones(3), jnp.ones(3), jnp.ones(1)),
    lambda: reward.bradley_terry_loss(jnp.ones((3, 1)), jnp.ones((3, 1)), jnp.ones((3, 1))),
    lambda: reward.centring_loss(jnp.ones(3), jnp.ones(1), center_coef=0.1),
])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()
