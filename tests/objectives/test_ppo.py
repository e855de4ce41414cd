"""PPO: preparation and loss against the loops, reward placement, the KL controller, the first step, and a score that rises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import ppo
from tests.objectives import tabular
from tests.objectives.settings import CONFIGS
from tests.reference import objectives as slow
from tests.reference.numeric import gradient

V, INF = 4, float("inf")


@functools.cache
def bind(**changes):
    return objectives.bind({**CONFIGS["ppo"], **changes})


@pytest.mark.parametrize("changes", [
    {}, {"whiten_rewards": False, "gamma": 1.0, "lam": 0.9},
    {"reward_scale": 2.0, "reward_clip": 0.5, "missing_eos_penalty": 3.0, "kl_estimator": "k3"},
])
def test_prepare_and_loss_against_the_loops(changes):
    rng = np.random.default_rng(0)
    h, bound, old = {**CONFIGS["ppo"], **changes}, bind(**changes), tabular.nets(rng, V)
    batch = tabular.with_reference(old, tabular.rollout(rng, 5, 7, V, filler=True))
    prepared, carry, metrics = tabular.prepare(bound, old, batch)
    (tables, ref), numpy = tabular.float64(old), tabular.as_numpy(batch)
    fixed = slow.ppo_prepare(tables["policy"], tables["critic"], ref, numpy, h["kl_coef"], h)
    for ours in ("old_logps", "values", "rewards", "advantages", "returns"):
        theirs = "old" if ours == "old_logps" else ours
        found = np.asarray(getattr(prepared, ours))
        np.testing.assert_allclose(np.where(fixed["mask"], found, 0), np.where(fixed["mask"], fixed[theirs], 0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["objective/kl"].compute(), fixed["kl"], rtol=1e-4)
    np.testing.assert_allclose(carry["kl_coef"], fixed["kl_coef"], rtol=1e-5)

    moved = {k: v + 0.3 * jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in old.params.items()}
    value, slopes = tabular.objective(bound, old.replace(params=moved), prepared)
    new = tabular.float64(old.replace(params=moved))[0]
    np.testing.assert_allclose(value, slow.ppo(new["policy"], new["critic"], numpy, fixed, h), rtol=1e-4, atol=1e-5)
    for name in ("policy", "critic"):
        f = lambda t, n=name: slow.ppo(**{"table": new["policy"], "critic": new["critic"]} | {{"policy": "table"}.get(n, n): t},  # noqa: E731
                                       batch=numpy, fixed=fixed, h=h)
        np.testing.assert_allclose(slopes[name], gradient(f, new[name]), rtol=2e-3, atol=1e-4)


def test_at_the_first_step_ratio_one_kl_zero_nothing_clipped():
    rng = np.random.default_rng(1)
    fake, bound = tabular.nets(rng, V, moved=0.0), bind()
    batch, _, prepared = tabular.prepare(bound, fake, tabular.with_reference(fake, tabular.rollout(rng, 6, 8, V)))
    terms, metrics = tabular.loss(bound, fake, batch)
    assert float(prepared["objective/kl"].compute()) == 0.0
    assert float(metrics["policy/ratio_max"].compute()) == 1.0
    assert [float(metrics[k].compute()) for k in ("policy/clip_frac", "policy/approx_kl", "value/clip_frac")] == [0, 0, 0]
    np.testing.assert_allclose(terms["policy"].compute(), 0.0, atol=1e-5)  # whitened advantages have mean zero


def test_actor_and_critic_are_read_in_one_pass():
    rng = np.random.default_rng(1)
    fake, bound = tabular.nets(rng, V).replace(calls=[]), bind()
    batch = tabular.with_reference(fake.replace(calls=None), tabular.rollout(rng, 4, 8, V))
    batch, _, _ = bound.prepare(fake, batch, bound.init_carry(fake), None)
    bound.loss(fake, batch, None)
    assert len(fake.calls) == 2 and all("values" in want for want in fake.calls)


def test_the_score_lands_on_the_last_response_token():
    mask = jnp.array([[False, True, True, False], [False, True, True, True], [False] * 4])
    rewards = ppo.token_rewards(jnp.array([5.0, 7.0, jnp.nan]), jnp.full((3, 4), 2.0), mask, jnp.float32(0.1), kl_estimator="k1")
    np.testing.assert_allclose(rewards, [[0, -0.2, 4.8, 0], [0, -0.2, -0.2, 6.8], [0, 0, 0, 0]], rtol=1e-6)


def test_scores_are_scaled_then_clipped():
    np.testing.assert_allclose(ppo.shaped_scores(jnp.array([-9.0, 0.5, 9.0]), reward_scale=2.0, reward_clip=5.0), [-5.0, 1.0, 5.0])
    np.testing.assert_allclose(ppo.shaped_scores(jnp.array([-9.0, 9.0]), reward_scale=1.0, reward_clip=INF), [-9.0, 9.0])


def test_a_truncated_row_pays_the_penalty_beyond_the_clip():
    rng = np.random.default_rng(2)
    fake = tabular.nets(rng, V, moved=0.0)
    batch = tabular.rollout(rng, 3, 8, V).replace(scores=jnp.full(3, 10.0))  # row 1 is truncated
    bound = bind(kl_coef=0.0, reward_clip=1.0, missing_eos_penalty=4.0, whiten_rewards=False)
    prepared, _, metrics = tabular.prepare(bound, fake, batch)
    np.testing.assert_allclose(prepared.rewards.sum(-1), [1.0, -3.0, 1.0], rtol=1e-6)
    assert float(metrics["objective/score"].compute()) == 10.0
    np.testing.assert_allclose(metrics["rollout/truncated"].compute(), 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("kl, expected", [(6.0, 1.0), (60.0, 1.02), (0.0, 0.98), (6.6, 1.01), (-3.0, 0.98)])
def test_the_controller_by_hand(kl, expected):
    got = ppo.updated_kl_coef(jnp.float32(1.0), jnp.float32(kl), jnp.float32(10.0), kl_target=6.0, kl_horizon=100.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_an_infinite_horizon_keeps_the_coefficient():
    got = ppo.updated_kl_coef(jnp.float32(0.3), jnp.float32(99.0), jnp.float32(10.0), kl_target=6.0, kl_horizon=INF)
    assert float(got) == np.float32(0.3)


@pytest.mark.parametrize("horizon", [1e-9, 0.8])
def test_a_horizon_that_a_batch_could_use_up_is_refused(horizon):
    """0.2 of 4 rows is 0.8: the coefficient would be 0 after a rollout without KL; a little more leaves a little of it."""
    rng = np.random.default_rng(4)
    fake = tabular.nets(rng, V)
    batch = tabular.with_reference(fake, tabular.rollout(rng, 4, 8, V))
    with pytest.raises(UserError, match=r"config.objective.kl_horizon = .*choose more than 0.8 sequences"):
        tabular.prepare(bind(kl_horizon=horizon), fake, batch)
    carry = tabular.prepare(bind(kl_horizon=0.81, kl_target=1e9), fake, batch)[1]
    assert 0 < float(carry["kl_coef"]) < 0.05


def test_a_value_clip_of_zero_is_refused_and_infinity_is_none():
    with pytest.raises(UserError, match=r"config.objective.value_clip = 0.0"):
        objectives.bind({**CONFIGS["ppo"], "value_clip": 0.0})
    rng = np.random.default_rng(4)
    fake = tabular.nets(rng, V)
    batch = tabular.prepare(bind(kl_coef=0.0), fake, tabular.rollout(rng, 4, 8, V))[0]
    assert float(tabular.loss(bind(value_clip=INF), tabular.nets(np.random.default_rng(5), V), batch)[1]["value/clip_frac"].compute()) == 0.0


def test_the_controller_and_the_metrics_see_what_the_newest_weights_drew():
    """Of a batch whose second half are earlier rows they are those of the first half alone."""
    rng = np.random.default_rng(7)
    fake, bound = tabular.nets(rng, V), bind(kl_horizon=100.0, kl_target=0.1)
    batch = tabular.with_reference(fake, tabular.rollout(rng, 6, 8, V))
    _, carry, metrics = tabular.prepare(bound, fake, batch.replace(version=jnp.array([3, 3, 3, 1, 2, 2])))
    _, alone, expected = tabular.prepare(bound, fake, jax.tree.map(lambda x: x[:3], batch))
    np.testing.assert_allclose(carry["kl_coef"], alone["kl_coef"], rtol=1e-6)
    for name in ("objective/score", "objective/score_std", "objective/kl", "objective/kl_from_reference", "objective/rlhf_reward",
                 "objective/non_score_reward", "rollout/length", "rollout/truncated", "rollout/unscored"):
        np.testing.assert_allclose(metrics[name].compute(), expected[name].compute(), rtol=1e-5, err_msg=name)


def test_the_coefficient_of_the_carry_is_the_one_used_and_logged():
    rng = np.random.default_rng(4)
    fake = tabular.nets(rng, V)
    bound = bind(whiten_rewards=False, missing_eos_penalty=0.0)
    batch = tabular.with_reference(fake, tabular.rollout(rng, 4, 8, V)).replace(scores=jnp.zeros(4))
    one, _, _ = bound.prepare(fake, batch, {"kl_coef": jnp.float32(1.0)}, None)
    two, carry, metrics = bound.prepare(fake, batch, {"kl_coef": jnp.float32(2.0)}, None)
    np.testing.assert_allclose(2 * one.rewards, two.rewards, rtol=1e-6)
    assert float(metrics["objective/kl_coef"].compute()) == 2.0 and float(carry["kl_coef"]) != 2.0
    for name in ("objective/rlhf_reward", "objective/non_score_reward"):
        np.testing.assert_allclose(metrics[name].compute(), -2.0 * metrics["objective/kl"].compute(), rtol=1e-5)


def test_a_zero_coefficient_needs_no_reference_and_any_other_says_so():
    rng = np.random.default_rng(5)
    fake, batch = tabular.nets(rng, V), tabular.rollout(rng, 4, 8, V)
    _, carry, metrics = tabular.prepare(bind(kl_coef=0.0), fake, batch)
    assert float(carry["kl_coef"]) == 0.0 and "objective/kl" not in metrics
    with pytest.raises(UserError, match="ppo needs the reference"):
        tabular.prepare(bind(), fake, batch)


def test_the_correction_multiplies_whitened_advantages():
    rng = np.random.default_rng(6)
    fake, batch = tabular.nets(rng, V), tabular.rollout(rng, 4, 8, V)
    old = fake.policy(batch.seqs).logps
    plain, _, _ = tabular.prepare(bind(kl_coef=0.0), fake, batch)
    twice, _, metrics = tabular.prepare(bind(kl_coef=0.0, correction="token_truncate"), fake, batch.replace(sampler_logps=old - jnp.log(2.0)))
    np.testing.assert_allclose(twice.advantages, 2.0 * plain.advantages, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(twice.returns, plain.returns)
    np.testing.assert_allclose(metrics["policy/correction_mean"].compute(), 2.0, rtol=1e-5)


def test_explained_variance():
    returns, mask = jnp.array([[1.0, 2.0, 4.0, 99.0]]), jnp.array([[True, True, True, False]])
    assert float(ppo.explained_variance(returns, returns, mask)) == 1.0
    np.testing.assert_allclose(ppo.explained_variance(jnp.full((1, 4), 3.0), returns, mask), 0.0, atol=1e-6)
    assert float(ppo.explained_variance(returns, jnp.ones((1, 4)), mask)) == 0.0


def test_overfit_the_score_rises_and_the_critic_learns():
    fake = tabular.TabularNets({"policy": jnp.zeros((V, V)), "critic": jnp.zeros(V)}, {"ref": jnp.zeros((V, V))})
    bound = bind(kl_coef=0.01, kl_horizon=INF, gamma=1.0, value_coef=1.0, value_clip=10.0, entropy_coef=0.0, whiten_rewards=False)

    @jax.jit
    def iteration(params, carry, key):
        nets = fake.replace(params=params)
        seqs = tabular.sample(nets, key, 64, 4)
        seqs = seqs.replace(ref_logps=nets.ref(seqs).logps)
        # The reward is for the last token alone, so credit has to travel through the critic and GAE.
        rollout = tabular.scored(seqs, (seqs.tokens[:, -1] == 2).astype(jnp.float32), group=1)
        rollout, carry, metrics = bound.prepare(nets, rollout, carry, key)
        for _ in range(2):
            slopes = jax.grad(lambda p: tabular.value(bound.loss(fake.replace(params=p), rollout, None)[0]))(params)
            params = jax.tree.map(lambda p, g: p - g, params, slopes)
        value = [bound.loss(fake.replace(params=p), rollout, None)[0]["value"].compute() for p in (fake.params, params)]
        return params, carry, metrics["objective/score"].compute(), value

    params, carry, scores = fake.params, bound.init_carry(fake), []
    for step in range(40):
        params, carry, score, value = iteration(params, carry, jax.random.key(step))
        scores.append(float(score))
    assert scores[0] < 0.45 and scores[-1] > 0.9
    assert value[1] < 0.5 * value[0]  # against the critic of zeros it started from


@pytest.mark.parametrize("call", [
    lambda: ppo.shaped_scores(jnp.ones((2, 1)), reward_scale=1.0, reward_clip=1.0),
    lambda: ppo.token_rewards(jnp.ones(2), jnp.ones((2, 3)), jnp.ones((2, 1), bool), jnp.float32(0.1), kl_estimator="k1"),
    lambda: ppo.token_rewards(jnp.ones(2), jnp.ones((2, 3)), jnp.ones((2, 3), bool), jnp.ones(2), kl_estimator="k1"),
    lambda: ppo.updated_kl_coef(jnp.ones(1), jnp.float32(1.0), jnp.float32(1.0), kl_target=1.0, kl_horizon=1.0),
    lambda: ppo.explained_variance(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((2, 3), bool)),
])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()
