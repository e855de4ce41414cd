"""GRPO: groups, the first step, β = 0 without a reference, and a score that rises; what it shares with its relatives is in test_rollouts.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import _policy, _rollouts
from tests.objectives import tabular
from tests.objectives.settings import CONFIGS

V = 4


@functools.cache
def bind(**changes):
    return objectives.bind({**CONFIGS["grpo"], **changes})


def test_at_the_first_step_the_ratio_is_one_and_nothing_is_clipped():
    rng = np.random.default_rng(0)
    fake, bound = tabular.nets(rng, V, moved=0.0), bind()
    batch, _, prepared = tabular.prepare(bound, fake, tabular.with_reference(fake, tabular.rollout(rng, 6, 8, V)))
    terms, metrics = tabular.loss(bound, fake, batch)
    assert float(metrics["policy/clip_frac"].compute()) == 0.0 and float(metrics["policy/approx_kl"].compute()) == 0.0
    assert float(metrics["policy/ratio_max"].compute()) == 1.0
    assert float(terms["kl"].compute()) == 0.0 and float(prepared["objective/kl"].compute()) == 0.0
    assert 0.0 < float(metrics["objective/entropy"].compute()) < np.log(V)


def test_a_group_without_variance_gives_no_gradient_and_is_counted():
    rng = np.random.default_rng(1)
    fake, bound = tabular.nets(rng, V), bind(beta=0.0, missing_eos_penalty=0.0)
    batch = tabular.rollout(rng, 6, 8, V).replace(scores=jnp.array([0.1, 0.1, 1.0, 1.0, -3.0, -3.0]))
    batch, _, metrics = tabular.prepare(bound, fake, batch)
    value, slopes = tabular.objective(bound, fake, batch)
    assert float(value) == 0.0 and not np.asarray(slopes["policy"]).any()
    assert (float(metrics["rollout/zero_variance_groups"].total), float(metrics["rollout/zero_variance_groups"].count)) == (3.0, 3.0)


def test_the_counts_of_groups_leave_filler_out():
    rng = np.random.default_rng(1)
    batch = tabular.rollout(rng, 6, 8, V, group=3).replace(scores=jnp.array([1.0, 2.0, 3.0, 1.0, 1.0, 9.0]),
                                                          truncated=jnp.zeros(6, bool))
    filler = batch.seqs.replace(segment_ids=batch.seqs.segment_ids.at[5].set(0))
    _, _, metrics = tabular.prepare(bind(beta=0.0), tabular.nets(rng, V), batch.replace(seqs=filler))
    assert (float(metrics["rollout/zero_variance_groups"].total), float(metrics["rollout/zero_variance_groups"].count)) == (1.0, 2.0)
    np.testing.assert_allclose(metrics["objective/score"].compute(), 8.0 / 5)
    np.testing.assert_allclose(metrics["objective/score_std"].compute(), np.std([1.0, 2.0, 3.0, 1.0, 1.0], ddof=1), rtol=1e-6)


def test_truncated_rows_pay_the_penalty_and_the_logged_score_does_not():
    rng = np.random.default_rng(2)
    fake = tabular.nets(rng, V)
    batch = tabular.rollout(rng, 4, 8, V, group=4).replace(scores=jnp.ones(4), truncated=jnp.array([True, False, False, False]))
    prepared, _, metrics = tabular.prepare(bind(beta=0.0, missing_eos_penalty=1.0), fake, batch)
    advantages = np.asarray(prepared.advantages).sum(-1) / np.maximum((np.asarray(prepared.advantages) != 0).sum(-1), 1)
    np.testing.assert_allclose(advantages, np.array([-1.5, 0.5, 0.5, 0.5]), rtol=1e-3)  # mean 3/4 − … over std 1/2
    assert float(metrics["objective/score"].compute()) == 1.0 and float(metrics["rollout/truncated"].compute()) == 0.25


def test_beta_zero_needs_no_reference_and_any_other_says_so():
    rng = np.random.default_rng(3)
    fake, batch = tabular.nets(rng, V), tabular.rollout(rng, 4, 8, V)
    bound = bind(beta=0.0)
    prepared, _, metrics = tabular.prepare(bound, fake, batch)
    assert set(tabular.loss(bound, fake, prepared)[0]) == {"policy"} and "objective/kl" not in metrics
    with pytest.raises(UserError, match=r"beta > 0 needs the reference"):
        bind(beta=0.1).loss(fake, prepared, None)


def test_an_unscored_or_unprepared_rollout_says_so():
    rng = np.random.default_rng(3)
    fake, batch = tabular.nets(rng, V), tabular.rollout(rng, 4, 8, V)
    with pytest.raises(UserError, match=r"config\.reward_from"):
        tabular.prepare(bind(), fake, batch.replace(scores=None))
    with pytest.raises(AssertionError, match="lacks old_logps, advantages"):
        bind().loss(fake, batch, None)


def test_overfit_the_score_rises():
    fake = tabular.TabularNets({"policy": jnp.zeros((V, V))}, {"ref": jnp.zeros((V, V))})
    bound, length = bind(beta=0.01, clip_low=0.2, clip_high=0.2), 4

    @jax.jit
    def iteration(params, key):
        nets = fake.replace(params=params)
        seqs = tabular.sample(nets, key, 64, length)
        seqs = seqs.replace(ref_logps=nets.ref(seqs).logps)
        rollout = tabular.scored(seqs, (seqs.tokens[:, 1:] == 2).mean(-1), group=8)
        rollout, _, metrics = bound.prepare(nets, rollout, {}, key)
        for _ in range(2):
            slopes = jax.grad(lambda p: tabular.value(bound.loss(fake.replace(params=p), rollout, None)[0]))(params)
            params = jax.tree.map(lambda p, g: p - 2.0 * g, params, slopes)
        return params, metrics["objective/score"].compute()

    params, scores = fake.params, []
    for step in range(25):
        params, score = iteration(params, jax.random.key(step))
        scores.append(float(score))
    assert scores[0] < 0.35 and scores[-1] > 0.9


@pytest.mark.parametrize("call", [
    lambda: _policy.kl_loss(jnp.ones((2, 3)), jnp.ones((2, 1)), beta=0.1, kl_estimator="k3", unbiased_kl=False),
    lambda: _rollouts.penalised(jnp.ones(3), jnp.ones(1, bool), missing_eos_penalty=1.0),
    lambda: _rollouts.log_ratio(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((2, 3), bool)),
    lambda: _rollouts.sequence_kl(jnp.ones((2, 3)), jnp.ones((2, 1), bool), jnp.ones(2, bool)),
    lambda: _rollouts.ratio_metrics(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((2, 3), bool), clip_low=0.2, clip_high=0.2),
    lambda: _rollouts.drift_metrics(jnp.ones((2, 3)), jnp.ones((2, 1), bool)),
    lambda: _rollouts.corrections(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((2, 3), bool), correction="none", correction_low=0.0,
                                  correction_high=3.0),
    lambda: _rollouts.rollout_metrics(tabular.rollout(np.random.default_rng(0), 2, 8, V), jnp.ones(3)),
    lambda: _rollouts.raw_scores(tabular.rollout(np.random.default_rng(0), 2, 8, V).replace(scores=jnp.ones(3))),
])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()
