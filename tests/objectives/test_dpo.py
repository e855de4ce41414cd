"""DPO: values, gradients, the starting point, and a preference that is learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import _pairs, _reference, dpo
from tests.objectives import tabular
from tests.reference import objectives as slow
from tests.reference.numeric import gradient

V = 4


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_value_and_gradient(beta):
    rng = np.random.default_rng(0)
    fake = tabular.nets(rng, V)
    batch = tabular.with_reference(fake, tabular.comparisons(rng, 4, 7, V, filler=True))
    (tables, ref), numpy = tabular.float64(fake), tabular.as_numpy(batch)
    value, slopes = tabular.objective(objectives.bind({"name": "dpo", "beta": beta}), fake, batch)
    np.testing.assert_allclose(value, slow.dpo(tables["policy"], ref, numpy, beta), rtol=1e-5)
    expected = gradient(lambda t: slow.dpo(t, ref, numpy, beta), tables["policy"])
    np.testing.assert_allclose(slopes["policy"], expected, rtol=1e-3, atol=1e-5)


def test_at_policy_equal_to_reference_the_loss_is_log_2_and_the_margin_0():
    rng = np.random.default_rng(1)
    fake = tabular.nets(rng, V, moved=0.0)
    batch = tabular.with_reference(fake, tabular.comparisons(rng, 5, 8, V))
    terms, metrics = tabular.loss(objectives.bind({"name": "dpo", "beta": 0.1}), fake, batch)
    np.testing.assert_allclose(terms["dpo"].compute(), np.log(2), rtol=1e-6)
    for name in ("reward/margin", "reward/chosen", "reward/rejected"):
        np.testing.assert_allclose(metrics[name].compute(), 0.0, atol=1e-6)


def test_by_hand():
    losses = dpo.dpo_loss(jnp.array([1.0, 500.0, -500.0]), jnp.array([-1.0, -500.0, 500.0]), beta=0.5)
    np.testing.assert_allclose(losses, [np.log1p(np.exp(-1.0)), 0.0, 500.0], rtol=1e-6)


def test_response_logps_are_sums_over_response_tokens():
    rng = np.random.default_rng(2)
    fake, batch = tabular.nets(rng, V), tabular.comparisons(rng, 3, 8, V)
    metrics = tabular.loss(objectives.bind({"name": "dpo", "beta": 0.1}), fake, tabular.with_reference(fake, batch))[1]
    table, numpy = tabular.float64(fake)[0]["policy"], tabular.as_numpy(batch.seqs)
    for k, name in enumerate(("logps/chosen", "logps/rejected")):
        rows = [slow.logps(table, numpy.tokens[b, k], numpy.segment_ids[b, k])[slow.loss_tokens(numpy, (b, k))].sum() for b in range(3)]
        np.testing.assert_allclose(metrics[name].compute(), np.mean(rows), rtol=1e-5)


def test_a_missing_reference_is_one_clear_sentence():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"dpo needs the reference's log-probs: set config\.reference_from"):
        objectives.bind({"name": "dpo", "beta": 0.1}).loss(tabular.nets(rng, V), tabular.comparisons(rng, 2, 8, V), None)


def test_overfit_the_margin_grows():
    rng = np.random.default_rng(3)
    fake = tabular.nets(rng, V, moved=0.0)
    batch = tabular.comparisons(rng, 4, 8, V)
    # Chosen responses are all of token 1, rejected ones of token 2.
    branch = jnp.where(batch.seqs.loss_mask, jnp.array([1, 2], jnp.int32)[None, :, None], 0)
    batch = tabular.with_reference(fake, batch.replace(seqs=batch.seqs.replace(tokens=branch)))
    bound = objectives.bind({"name": "dpo", "beta": 0.5})
    trained = tabular.descend(bound, fake, batch, steps=100, rate=1.0)
    terms, metrics = tabular.loss(bound, trained, batch)
    assert float(metrics["reward/margin"].compute()) > 2.0 and float(metrics["reward/accuracy"].compute()) == 1.0
    assert float(terms["dpo"].compute()) < 0.2
    towards = jax.nn.softmax(trained.params["policy"]) - jax.nn.softmax(fake.params["policy"])
    assert towards[0, 1] > 0 > towards[0, 2]


@pytest.mark.parametrize("call", [
    lambda: dpo.dpo_loss(jnp.ones(3), jnp.ones(1), beta=0.1),
    lambda: dpo.dpo_loss(jnp.ones((3, 1)), jnp.ones((3, 1)), beta=0.1),
    lambda: _pairs.pair_metrics(jnp.ones((3, 2)), jnp.ones((3, 1)), tabular.comparisons(np.random.default_rng(0), 3, 8, V)),
    lambda: _pairs.reward_metrics(jnp.ones(2), jnp.ones(2), tabular.comparisons(np.random.default_rng(0), 3, 8, V)),
    lambda: _reference.reference_logps(tabular.sequences(np.random.default_rng(0), (3, 8), V).replace(ref_logps=jnp.ones((3, 1))), "dpo"),
])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()
