"""KTO, BCO and APO-zero: by hand at the reference, the reference point, state over several batches, classes of one kind only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import _unpaired, apo_zero_unpaired, bco, kto
from rlhf_jax.ops.running import RunningMoments
from tests.objectives import tabular
from tests.objectives.settings import bound, config, moved

V = 5
NAMES = ["kto", "bco", "apo_zero_unpaired"]
GOOD = jnp.array([True, True, False, False])
PLAIN = {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.0}


def batch_of(seed, *, apart=0.5, rows=6, filler=True):
    rng = np.random.default_rng(seed)
    fake = tabular.nets(rng, V, moved=apart)
    return fake, tabular.with_reference(fake, tabular.unpaired(rng, rows, 8, V, filler=filler))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def test_by_hand():
    ratios, z = jnp.array([2.0, -400.0, 2.0, -400.0]), jnp.full(4, 1.0)
    found = kto.kto_loss(ratios, GOOD, z, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    np.testing.assert_allclose(found, [2 * (1 - sigmoid(0.5)), 2.0, 3 * (1 - sigmoid(-0.5)), 0.0], rtol=1e-5)
    found = bco.bco_loss(ratios, GOOD, jnp.full(4, 0.25), beta=0.5)
    np.testing.assert_allclose(found, [np.log1p(np.exp(-0.75)), 200.25, np.log1p(np.exp(0.75)), 0.0], rtol=1e-5)
    found = apo_zero_unpaired.apo_zero_unpaired_loss(ratios, GOOD, beta=0.5)
    np.testing.assert_allclose(found, [1 - sigmoid(1.0), 1.0, sigmoid(1.0), 0.0], rtol=1e-5)


def test_apo_zero_is_kto_without_a_reference_point():
    ratios = jnp.array([0.3, -2.0, 1.0, -0.1])
    found = apo_zero_unpaired.apo_zero_unpaired_loss(ratios, GOOD, beta=0.5)
    np.testing.assert_allclose(found, kto.kto_loss(ratios, GOOD, jnp.zeros(4), **PLAIN), rtol=1e-6)


def test_a_larger_reference_point_asks_more_of_the_good_and_less_of_the_bad():
    ratios, slope = jnp.array([1.0, -1.0, 1.0, -1.0]), jax.grad(lambda z: (kto.kto_loss(ratios, GOOD, z, **PLAIN)).sum())
    low, high = (kto.kto_loss(ratios, GOOD, jnp.full(4, z), **PLAIN) for z in (0.0, 2.0))
    assert (np.asarray(high > low) == np.asarray(GOOD)).all()
    assert not np.asarray(slope(jnp.ones(4))).any()  # held fixed


@pytest.mark.parametrize("name", NAMES)
def test_at_policy_equal_to_reference(name):
    fake, batch = batch_of(1, apart=0.0)
    objective = objectives.bind(config(name, **{k: 1.0 for k in ("desirable_weight", "undesirable_weight") if name == "kto"}))
    prepared, _, metrics = tabular.prepare(objective, fake, batch)
    terms, more = tabular.loss(objective, fake, prepared)
    assert {k: round(float(m.compute()), 5) for k, m in terms.items()} == (
        {"desirable": 0.69315, "undesirable": 0.69315} if name == "bco" else {name: 0.5}
    )
    for key in ("reward/chosen", "reward/rejected", "reward/margin"):
        np.testing.assert_allclose(more[key].compute(), 0.0, atol=1e-6)
    if name == "kto":
        np.testing.assert_allclose(metrics["objective/kl"].compute(), 0.0, atol=1e-6)


def test_the_reference_point_is_the_mean_over_real_rows_and_never_negative():
    mask = jnp.array([True, True, False])
    assert float(kto.reference_point(jnp.array([3.0, -1.0, 100.0]), mask)) == 1.0
    assert float(kto.reference_point(jnp.array([-3.0, 1.0, 100.0]), mask)) == 0.0
    assert float(kto.reference_point(jnp.array([3.0, 1.0, 100.0]), mask & False)) == 0.0


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_kto_compares_every_row_with_one_reference_point(seed):
    """Estimated on the mismatched rows by the policy before the update, whatever the batch's own responses are."""
    fake, batch = batch_of(seed)
    prepared, _, metrics = tabular.prepare(bound("kto"), fake, batch)
    ratios = _unpaired.response_sums(fake.policy(batch.kl_seqs).logps, batch.kl_seqs, "kto")[1]
    np.testing.assert_allclose(metrics["objective/kl"].compute(), ratios[:5].mean(), rtol=1e-5)
    np.testing.assert_allclose(prepared.baseline, np.full(6, max(float(ratios[:5].mean()), 0.0)), rtol=1e-5)
    assert prepared.kl_seqs is None
    other = batch.replace(desirable=~batch.desirable, seqs=batch.kl_seqs)
    np.testing.assert_array_equal(tabular.prepare(bound("kto"), fake, other)[0].baseline, prepared.baseline)


def test_bco_shifts_by_the_mean_over_all_batches_so_far():
    carry, met = bco.init_carry(None), []
    for seed, rows in ((0, 6), (1, 4), (2, 6)):
        fake, batch = batch_of(seed, rows=rows)
        prepared, carry, metrics = jax.jit(bound("bco").prepare)(fake, batch, carry, jax.random.key(0))
        rewards = 0.4 * _unpaired.response_sums(fake.policy(batch.seqs).logps, batch.seqs, "bco")[1]
        met += rewards[: rows - 1].tolist()  # the last row is filler
        np.testing.assert_allclose(prepared.baseline, np.full(rows, np.mean(met)), rtol=1e-5)
        assert isinstance(carry["rewards"], RunningMoments) and float(carry["rewards"].count) == len(met)
        np.testing.assert_allclose(metrics["reward/std"].compute(), np.std(met, ddof=1), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("good", [True, False])
def test_a_batch_of_one_class(name, good):
    """The other class's metrics are empty, nothing is NaN, and a step of descent moves the rewards the right way."""
    fake, batch = batch_of(6, filler=False)
    prepared, _, _ = tabular.prepare(bound(name), fake, batch.replace(desirable=jnp.full(6, good)))
    _, metrics = tabular.loss(bound(name), fake, prepared)
    here, there = ("reward/chosen", "reward/rejected") if good else ("reward/rejected", "reward/chosen")
    assert (float(metrics[here].count), float(metrics[there].count), float(metrics[there].compute())) == (6.0, 0.0, 0.0)
    _, slopes = tabular.objective(bound(name), fake, prepared)
    assert np.isfinite(slopes["policy"]).all()
    after = tabular.loss(bound(name), fake.replace(params={**fake.params, "policy": fake.params["policy"] - 0.05 * slopes["policy"]}), prepared)[1]
    assert (float(after[here].compute()) > float(metrics[here].compute())) == good


def test_margin_and_accuracy_are_measured_from_the_baseline():
    _, batch = batch_of(0, rows=5)
    batch = batch.replace(desirable=jnp.array([True, True, False, False, True]))
    rewards = jnp.array([2.0, 0.5, 0.5, 1.0, 99.0])  # the last row is filler; the baseline is 1
    metrics = _unpaired.feedback_metrics(rewards, jnp.ones(5), -rewards, batch)
    found = {name: (float(m.total), float(m.count)) for name, m in metrics.items()}
    assert found == {
        "reward/chosen": (2.5, 2.0), "reward/rejected": (1.5, 2.0), "reward/margin": (1.0, 4.0), "reward/accuracy": (2.5, 4.0),
        "logps/chosen": (-2.5, 2.0), "logps/rejected": (-1.5, 2.0),
    }


def test_the_mismatched_rows_matter_to_kto_alone():
    for name in NAMES:
        fake, batch = batch_of(7)
        other = batch.replace(kl_seqs=batch.kl_seqs.replace(tokens=(batch.kl_seqs.tokens + 1) % V))
        point = moved(fake, np.random.default_rng(8))
        found = [float(tabular.objective(bound(name), point, tabular.prepare(bound(name), fake, b)[0])[0]) for b in (batch, other)]
        assert (found[0] != found[1]) == (name == "kto")


def test_what_is_missing_is_said():
    fake, batch = batch_of(9)
    with pytest.raises(UserError, match=r"kto needs the reference's log-probs: set config\.reference_from"):
        bound("kto").prepare(fake, batch.replace(kl_seqs=batch.kl_seqs.replace(ref_logps=None)), {}, None)
    with pytest.raises(AssertionError, match="call the objective's prepare"):
        bound("kto").loss(fake, batch, None)
    with pytest.raises(AssertionError, match="kl_seqs"):
        bound("kto").prepare(fake, batch.replace(kl_seqs=None), {}, None)


@pytest.mark.parametrize("call", [
    lambda: kto.kto_loss(jnp.ones(4), GOOD, jnp.ones(1), **PLAIN),
    lambda: kto.reference_point(jnp.ones((4, 1)), jnp.ones((4, 1), bool)),
    lambda: bco.bco_loss(jnp.ones(4), GOOD, jnp.float32(1.0), beta=0.1),
    lambda: apo_zero_unpaired.apo_zero_unpaired_loss(jnp.ones(3), GOOD, beta=0.1),
    lambda: _unpaired.feedback_metrics(jnp.ones(4), jnp.ones(4), jnp.ones(4), batch_of(0)[1]),
])  # fmt: skip
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()
