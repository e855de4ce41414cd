"""Policy gradients without a critic: second forms by option against the loops, what they share at the first step, groups, corrections, masks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import _rollouts, cispo, gmpo, rloo, sapo, vespo
from rlhf_jax.ops.masking import loss_tokens
from tests import reference
from tests.objectives import tabular
from tests.objectives.settings import V, config, moved
from tests.reference.numeric import gradient

INF = float("inf")
GROUPED = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo", "gmpo", "luspo", "vespo", "rloo")
ALL = (*GROUPED, "reinforce", "reinforce_pp")


@functools.cache
def _bind(name: str, changes: tuple[tuple[str, Any], ...]) -> Any:
    return objectives.bind({"name": name, **objectives.load(name).DEFAULTS, **dict(changes)})


def bind(name: str, **changes: Any) -> Any:
    """The objective with its defaults; one object per set of changes."""
    return _bind(name, tuple(sorted(changes.items())))


def rolled(seed: int = 0, *, rows: int = 6, group: int = 3, length: int = 7) -> Any:
    """(nets, a rollout of which row 1 is truncated, drawn from another distribution than the policy's)."""
    rng = np.random.default_rng(seed)
    fake = tabular.nets(rng, V)
    batch = tabular.with_reference(fake, tabular.rollout(rng, rows, length, V, group=group))
    noise = jnp.asarray(0.4 * rng.normal(size=(rows, length)), jnp.float32)
    return fake, batch.replace(sampler_logps=fake.policy(batch.seqs).logps + noise)


@pytest.mark.parametrize(("name", "changes"), [
    ("grpo", {"kl_in": "reward", "kl_estimator": "k1", "beta": 0.3}),
    ("grpo", {"beta": 0.3, "kl_estimator": "k1", "unbiased_kl": True, "mask_truncated": True, "off_policy_kl": 0.1}),
    ("grpo", {"clip_high": 0.28, "dual_clip": 1.1}),
    ("rloo", {"dual_clip": 1.2}),
    ("dapo", {"overlong_length": 5, "overlong_buffer": 3, "ratio_level": "sequence"}),
    ("gspo", {"clip_low": 0.05, "clip_high": 0.05, "correction": "token_truncate", "correction_high": 1.2}),
    ("cispo", {"correction": "token_mask", "correction_low": 0.7, "correction_high": 1.5, "clip_high": 0.1}),
    ("gmpo", {"correction": "token_mask", "correction_low": 0.7, "correction_high": 1.5, "beta": 0.1}),
    ("vespo", {"correction": "sequence_mask", "correction_low": 0.5, "correction_high": 2.0}),
    ("vespo", {"correction": "sequence_truncate", "correction_low": 0.9, "correction_high": 1.1}),
    ("rloo", {"kl_in": "loss", "kl_estimator": "k2", "beta": 0.2, "correction": "token_truncate", "correction_high": 1.2}),
    ("reinforce", {"batch_baseline": False, "kl_in": "loss", "kl_estimator": "k3"}),
    ("reinforce_pp", {"group_baseline": True, "kl_in": "loss", "kl_estimator": "k2", "beta": 0.2, "mask_truncated": True}),
])
def test_other_forms_against_the_loops(name, changes):
    (fake, batch), bound = rolled(), bind(name, **changes)
    prepared, _, _ = tabular.prepare(bound, fake, batch)
    point = moved(fake, np.random.default_rng(1))
    value, slopes = tabular.objective(bound, point, prepared)
    (old, ref), (new, _) = tabular.float64(fake), tabular.float64(point)
    case = reference.Case(old=old, at=new, ref=ref, batch=tabular.as_numpy(batch), h={**objectives.load(name).DEFAULTS, **changes}, carry={})
    f = lambda table: reference.find(name)({**new, "policy": table}, case)  # noqa: E731
    np.testing.assert_allclose(value, f(new["policy"]), rtol=5e-5, atol=2e-6)
    np.testing.assert_allclose(slopes["policy"], gradient(f, new["policy"]), rtol=2e-3, atol=2e-5)


# --- the first step ---


@pytest.mark.parametrize("name", ALL)
def test_at_the_first_step_ratios_are_one_and_nothing_is_clipped(name):
    rng = np.random.default_rng(0)
    fake, bound = tabular.nets(rng, V, moved=0.0), bind(name, beta=0.1)
    batch, _, prepared = tabular.prepare(bound, fake, tabular.with_reference(fake, tabular.rollout(rng, 6, 7, V)))
    terms, metrics = tabular.loss(bound, fake, batch)
    assert float(metrics["policy/ratio_max"].compute()) == 1.0 and float(metrics["policy/approx_kl"].compute()) == 0.0
    assert "policy/clip_frac" not in metrics or float(metrics["policy/clip_frac"].compute()) == 0.0
    assert float(prepared["objective/kl"].compute()) == 0.0 and ("kl" not in terms or float(terms["kl"].compute()) == 0.0)


def first_gradient(name: str, prepared: Any, fake: Any) -> np.ndarray:
    """Of the policy term alone, on a batch that GRPO prepared."""
    bound = bind(name, beta=0.0, **({"length_scale": 1.0} if name == "dr_grpo" else {}))
    if name == "vespo":
        prepared = vespo.CorrectedRollout(**vars(prepared), log_correction=jnp.zeros(prepared.truncated.shape))
    return np.asarray(tabular.objective(bound, fake, prepared)[1]["policy"])


@pytest.mark.parametrize("family", [("grpo", "gspo", "sapo", "gmpo"), ("bnpo", "dapo", "cispo", "vespo", "reinforce_pp"),
                                    ("dr_grpo", "luspo", "rloo", "reinforce")])
def test_the_first_step_tells_objectives_apart_by_what_they_average_over_alone(family):
    """Row means, token means, row sums: within each, every surrogate has the policy gradient −A ∇log π at ρ = 1."""
    fake, batch = rolled()
    prepared, _, _ = tabular.prepare(bind("grpo", beta=0.0), fake, batch)
    expected = first_gradient(family[0], prepared, fake)
    assert np.abs(expected).max() > 1e-3
    for name in family[1:]:
        np.testing.assert_allclose(first_gradient(name, prepared, fake), expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_gspo_of_one_token_is_grpo_and_dapo_without_its_changes_is_bnpo():
    fake, batch = rolled()
    mask = np.asarray(loss_tokens(batch.seqs))
    last = jnp.asarray(mask & (np.arange(7) == np.where(mask, np.arange(7), -1).max(-1, keepdims=True)))
    point = moved(fake, np.random.default_rng(1))
    single = batch.replace(seqs=batch.seqs.replace(loss_mask=last))
    clip = {"clip_low": 0.1, "clip_high": 0.1, "missing_eos_penalty": 0.0, "beta": 0.0}
    plain = {"overlong_length": 0, "mask_truncated": False, "filter_groups": False, "clip_high": 0.2}
    for batch_, pair in ((single, (bind("gspo", **clip), bind("grpo", **clip))), (batch, (bind("dapo", **plain), bind("bnpo")))):
        got = [tabular.objective(bound, point, tabular.prepare(bound, fake, batch_)[0]) for bound in pair]
        np.testing.assert_allclose(got[0][0], got[1][0], rtol=1e-6)
        np.testing.assert_allclose(got[0][1]["policy"], got[1][1]["policy"], rtol=1e-5, atol=1e-7)


# --- groups ---


@pytest.mark.parametrize("name", GROUPED)
def test_groups_without_variance_give_no_gradient_and_are_counted(name):
    fake, batch = rolled()
    bound = bind(name, beta=0.0, missing_eos_penalty=0.0)
    batch = batch.replace(scores=jnp.array([0.1] * 3 + [0.7] * 3))
    prepared, _, metrics = tabular.prepare(bound, fake, batch)
    value, slopes = tabular.objective(bound, moved(fake, np.random.default_rng(1)), prepared)
    assert float(value) == 0.0 and not np.asarray(slopes["policy"]).any()
    counted = metrics["rollout/zero_variance_groups"]
    assert (float(counted.total), float(counted.count)) == (2.0, 2.0)


def test_dapo_filters_groups_as_if_they_were_not_there():
    fake, batch = rolled()
    batch = batch.replace(scores=jnp.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), truncated=jnp.zeros(6, bool))
    bound, point = bind("dapo"), moved(fake, np.random.default_rng(1))
    whole, half = (tabular.objective(bound, point, tabular.prepare(bound, fake, part)[0])
                   for part in (batch, jax_rows(batch, 3)))
    np.testing.assert_allclose(whole[0], half[0], rtol=1e-5)
    np.testing.assert_allclose(whole[1]["policy"], half[1]["policy"], rtol=1e-4, atol=1e-7)
    kept = bind("dapo", filter_groups=False)
    assert float(tabular.objective(kept, point, tabular.prepare(kept, fake, batch)[0])[0]) != pytest.approx(float(whole[0]))


def jax_rows(batch: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x[:count], batch)


def test_an_unscored_row_enters_no_baseline_and_gives_no_gradient():
    fake, batch = rolled()
    scores = jnp.array([1.0, 4.0, 3.0, 2.0, 0.0, 5.0])
    for name in ("grpo", "rloo", "reinforce", "reinforce_pp"):
        bound = bind(name, beta=0.0, missing_eos_penalty=0.0)
        prepared, _, metrics = tabular.prepare(bound, fake, batch.replace(scores=scores.at[0].set(jnp.nan)))
        assert not np.asarray(prepared.advantages[0]).any() and np.isfinite(prepared.advantages).all()
        np.testing.assert_allclose(metrics["rollout/unscored"].compute(), 1 / 6, rtol=1e-6)
        np.testing.assert_allclose(metrics["objective/score"].compute(), 14 / 5, rtol=1e-6)
        if name == "rloo":  # each of the two left is compared with the other
            np.testing.assert_allclose(prepared.advantages.max(-1)[1], 1.0, rtol=1e-6)
            np.testing.assert_allclose(prepared.advantages.min(-1)[2], -1.0, rtol=1e-6)


def test_rows_cut_short_are_masked_and_still_count_in_the_baseline():
    fake, batch = rolled()
    batch = batch.replace(scores=jnp.array([1.0, 4.0, 1.0, 2.0, 0.0, 5.0]))  # row 1 is truncated
    prepared, _, _ = tabular.prepare(bind("grpo", advantage_scale="none", missing_eos_penalty=0.0, mask_truncated=True), fake, batch)
    assert not loss_tokens(prepared.seqs)[1].any() and loss_tokens(prepared.seqs)[0].any()
    np.testing.assert_allclose(prepared.advantages.min(-1)[0], -1.0, rtol=1e-6)


# --- corrections ---


@pytest.mark.parametrize("kind", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_correction_of_the_trainers_own_samples_is_exactly_one(kind):
    fake, batch = rolled()
    batch = batch.replace(sampler_logps=fake.policy(batch.seqs).logps)
    for name in ("grpo", "vespo"):
        with_, without = (tabular.prepare(bind(name, beta=0.0, correction=c), fake, batch) for c in (kind, "none"))
        np.testing.assert_array_equal(with_[0].advantages, without[0].advantages)
        np.testing.assert_array_equal(with_[0].old_logps, without[0].old_logps)
    metrics = {k: float(m.compute()) for k, m in with_[2].items() if "correction" in k or "gap" in k}
    assert metrics == {"policy/correction_mean": 1.0, "policy/correction_max": 1.0, "policy/correction_frac": 0.0,
                       "rollout/logp_gap_mean": 0.0, "rollout/logp_gap_p99": 0.0, "rollout/logp_gap_max": 0.0}


def test_a_masked_correction_takes_the_whole_row_out():
    fake, batch = rolled()
    old = fake.policy(batch.seqs).logps
    sampler = (old - 1e-3).at[2].set(old[2] - 5.0).at[4].set(old[4] + 5.0)  # the sampler thought row 2 far less likely, row 4 far more
    bound = bind("grpo", beta=0.0, correction="sequence_mask", correction_low=0.5, correction_high=2.0)
    prepared, _, metrics = tabular.prepare(bound, fake, batch.replace(sampler_logps=sampler))
    assert [bool(row.any()) for row in np.asarray(prepared.advantages)] == [True, True, False, True, False, True]
    mask = np.asarray(loss_tokens(batch.seqs))
    np.testing.assert_allclose(metrics["policy/correction_frac"].compute(), mask[[2, 4]].sum() / mask.sum(), rtol=1e-6)


def test_vespo_weighs_a_sequence_by_its_sampler():
    """W is the ratio to the sampler, as far as the correction lets it count: exactly, where no bound is met."""
    fake, batch = rolled()
    point, mask = moved(fake, np.random.default_rng(1)), loss_tokens(batch.seqs)
    log_w = np.where(mask, point.policy(batch.seqs).logps - batch.sampler_logps, 0.0).sum(-1)
    for kind in ("token_truncate", "sequence_truncate"):
        prepared, _, _ = tabular.prepare(bind("vespo", correction=kind, correction_high=INF), fake, batch)
        got = np.where(mask, point.policy(batch.seqs).logps - prepared.old_logps, 0.0).sum(-1) + prepared.log_correction
        np.testing.assert_allclose(got, log_w, rtol=1e-4, atol=1e-5)


# --- rows without a score ---


@pytest.mark.parametrize("name", [*GROUPED, "reinforce", "reinforce_pp", "ppo", "online_dpo", "xpo", "nash_md"])
def test_a_completion_without_a_score_is_as_if_it_were_not_there(name):
    """NaN trains like a filler row: no baseline, no gradient, no place in a mean; only the count of unscored rows tells."""
    bound = objectives.bind(config(name))
    fake, batch = tabular.nets(np.random.default_rng(3), V), tabular.rollout(np.random.default_rng(3), 6, 7, V)
    batch = tabular.with_reference(fake, batch)
    gone = jnp.arange(6) == 4
    unscored = batch.replace(scores=jnp.where(gone, jnp.nan, batch.scores))
    filler = batch.replace(seqs=batch.seqs.replace(segment_ids=jnp.where(gone[:, None], 0, batch.seqs.segment_ids)))
    point = moved(fake, np.random.default_rng(4))
    got, expected = (tabular.objective(bound, point, tabular.prepare(bound, fake, rows)[0]) for rows in (unscored, filler))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-6)
    for table in got[1]:
        np.testing.assert_allclose(got[1][table], expected[1][table], rtol=1e-4, atol=1e-6)


def test_completion_scores_are_zero_where_there_is_none():
    fake, batch = rolled()
    batch = batch.replace(scores=batch.scores.at[1].set(jnp.nan))  # row 1 is truncated too
    scores, known, _ = _rollouts.completion_scores(batch, fake.policy(batch.seqs).logps, beta=0.3, kl_estimator="k1", kl_in="reward",
                                                   missing_eos_penalty=1.0)
    assert float(scores[1]) == 0.0 and known.tolist() == [True, False, True, True, True, True] and (scores[known] != 0).all()


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_logged_reward_of_reinforce_pp_knows_no_baseline(kl_in):
    """Centred scores have the mean 0, whatever the policy earns."""
    fake, batch = rolled()
    batch = batch.replace(scores=batch.scores + 5.0)
    with_baseline, without = (tabular.prepare(bind("reinforce_pp", group_baseline=flag, kl_in=kl_in), fake, batch)[2] for flag in (True, False))
    found = float(with_baseline["objective/rlhf_reward"].compute())
    assert found > 2.0 and found == pytest.approx(float(without["objective/rlhf_reward"].compute()), rel=1e-6)


@pytest.mark.parametrize("name", ["grpo", "rloo", "dr_grpo"])
def test_no_eps_is_no_nan(name):
    fake, batch = rolled()
    bound = bind(name, advantage_eps=0.0, **({"normalise_advantages": True} if name == "rloo" else {}))
    prepared, _, _ = tabular.prepare(bound, fake, batch.replace(scores=jnp.full(6, 0.7), truncated=jnp.zeros(6, bool)))
    assert np.isfinite(prepared.advantages).all()


# --- single facts ---


def test_cispos_gradient_by_hand():
    """A · min(ρ, cap) per token, whichever way the ratio went: no token loses its gradient."""
    log_ratios, advantages = jnp.log(jnp.array([[8.0, 8.0, 0.5, 1.0]])), jnp.array([[1.0, -2.0, 3.0, 1.0]])
    slope = jax.grad(lambda x: cispo.cispo_loss(x, x, advantages, clip_low=1.0, clip_high=4.0).sum())(log_ratios)
    np.testing.assert_allclose(slope, [[-5.0, 10.0, -1.5, -1.0]], rtol=1e-6)


def test_sapos_gate_is_one_at_the_start_and_fades_on_both_sides():
    slope = jax.vmap(jax.grad(lambda x, a: sapo.sapo_loss(x[None, None], a[None, None], temperature_pos=1.0,
                                                                         temperature_neg=5.0)[0, 0]))
    ratios = jnp.array([0.2, 1.0, 3.0])
    for a in (1.0, -1.0):
        gate = -slope(jnp.log(ratios), jnp.full(3, a)) / ratios / a  # dL/dρ over −A
        np.testing.assert_allclose(gate[1], 1.0, rtol=1e-6)
        assert gate[0] < 1.0 and gate[2] < 1.0
    up, down = (float(sapo.sapo_loss(jnp.full((1, 1), 9.0), jnp.full((1, 1), a), temperature_pos=1.0, temperature_neg=5.0)[0, 0]) for a in (1, -1))
    np.testing.assert_allclose([up, down], [-4.0, 0.8], rtol=1e-6)  # 4/τ is all that a ratio can gain


def test_gmpo_is_held_by_no_outlier():
    x, mask = jnp.log(jnp.array([[1.0, 1.0, 1.0, 16.0], [1.0, 1.0, 1.0, 16.0]])), jnp.ones((2, 4), bool)
    advantages = jnp.array([[1.0], [-1.0]]) * mask
    wide, narrow = (gmpo.gmpo_loss(x, advantages, mask, clip_low=c, clip_high=c) for c in (9.0, 0.4))
    np.testing.assert_allclose(wide, [-2.0, 2.0], rtol=1e-6)  # ⁴√16, where the mean of the ratios is 4.75
    np.testing.assert_allclose(narrow, [-np.exp(0.1), 2.0], rtol=1e-6)  # clipped on the side that the advantage pushes to


def test_vespos_kernel():
    k = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
    w = jnp.array([1.0, 2 / 3, 1e-12, 1e12, 1.5])
    weights = vespo.gamma_weights(jnp.log(w), jnp.array([1.0, 1.0, 1.0, 1.0, -1.0]), **k)
    np.testing.assert_allclose(weights, [1.0, (2 / 3) ** 2 * np.e, 0.0, 0.0, 1.5**3 / np.e], rtol=1e-5, atol=1e-12)
    slope = jax.grad(lambda x: vespo.gamma_weights(x, jnp.ones(5), **k).sum())(jnp.log(w))
    assert not np.asarray(slope).any()


def test_rloo_clips_the_whole_sequence():
    x, mask = jnp.log(jnp.array([[1.15, 1.15], [1.15, 1.0]])), jnp.ones((2, 2), bool)
    losses, (below, above) = rloo.rloo_loss(x, jnp.ones((2, 2)), mask, clip_low=0.2, clip_high=0.2, dual_clip=INF)
    np.testing.assert_allclose(losses, [-1.2, -1.15], rtol=1e-6)
    assert above.tolist() == [True, False] and not below.any()


def test_rows_left_behind_give_no_gradient_where_the_advantage_is_negative():
    fake, batch = rolled()
    batch = batch.replace(sampler_logps=fake.policy(batch.seqs).logps.at[jnp.array([0, 1])].add(1.0), truncated=jnp.zeros(6, bool),
                          scores=jnp.array([1.0, 0.0, 0.5, 1.0, 0.0, 0.5]))  # rows 0 and 1 are one nat per token away from their sampler
    bound = bind("grpo", beta=0.0, off_policy_kl=0.5)
    prepared, _, _ = tabular.prepare(bound, fake, batch)
    without = prepared.replace(advantages=prepared.advantages.at[1].set(0.0))
    plain = bind("grpo", beta=0.0)
    np.testing.assert_allclose(tabular.objective(bound, fake, prepared)[1]["policy"], tabular.objective(plain, fake, without)[1]["policy"],
                               rtol=1e-5, atol=1e-7)
    mask = np.asarray(loss_tokens(batch.seqs))
    left_out = tabular.loss(bound, fake, prepared)[1]["policy/off_policy_frac"].compute()
    np.testing.assert_allclose(left_out, mask[1].sum() / mask.sum(), rtol=1e-6)


@pytest.mark.parametrize(("key", "value"), [("kl_estimator", "k4"), ("kl_in", "rewards"), ("advantage_scale", "groups"), ("correction", "token"),
                                            ("ratio_level", "sequences")])
def test_an_unknown_name_is_refused_with_the_legal_ones(key, value):
    """At start-up, whether or not it would be read: β may be 0."""
    with pytest.raises(UserError, match=rf"^config\.objective\.{key} is '{value}', which is none of its values( \(did you mean '|; legal names are)"):
        bind("grpo", **{key: value})


@pytest.mark.parametrize("call", [
    lambda: cispo.cispo_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 1)), clip_low=1.0, clip_high=4.0),
    lambda: sapo.sapo_loss(jnp.ones((2, 3)), jnp.ones((2, 1)), temperature_pos=1.0, temperature_neg=1.0),
    lambda: gmpo.gmpo_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 1), bool), clip_low=0.4, clip_high=0.4),
    lambda: vespo.gamma_weights(jnp.ones(2), jnp.ones((2, 1)), k_pos=1.0, lambda_pos=1.0, k_neg=1.0, lambda_neg=1.0),
    lambda: rloo.rloo_loss(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((2, 3), bool), clip_low=1.0, clip_high=INF, dual_clip=INF),
])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()


# --- metrics, by hand ---


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_metrics_of_a_batch_by_hand(name):
    """The gap, both directions of the KL and the ratio's tail, from the log-probs that the tables give."""
    fake, batch = rolled()
    old, ref, mask = (np.asarray(x) for x in (fake.policy(batch.seqs).logps, batch.seqs.ref_logps, loss_tokens(batch.seqs)))
    gaps = np.linspace(-0.3, 0.2, mask.size).reshape(mask.shape).astype(np.float32)
    bound = objectives.bind({"name": name, **objectives.load(name).DEFAULTS, **({"beta": 0.1} if name == "grpo" else {})})
    sampled = batch.replace(sampler_logps=jnp.asarray(old) - 5.0, plain_logps=jnp.asarray(old + gaps))  # a filter's 5 nats do not count
    prepared, _, metrics = tabular.prepare(bound, fake, sampled)
    x = np.where(mask, old - ref, 0.0)
    rows = np.asarray(batch.real)
    read = {key: float(m.compute()) for key, m in metrics.items()}
    assert read["objective/kl"] == pytest.approx(x.sum(-1)[rows].mean(), rel=1e-4)
    assert read["objective/kl_from_reference"] == pytest.approx((1 - np.exp(-x) * (1 + x)).sum(-1)[rows].mean(), rel=1e-4)
    own = np.sort(np.abs(gaps)[mask])
    assert read["rollout/logp_gap_mean"] == pytest.approx(own.mean(), rel=1e-4) and read["rollout/logp_gap_max"] == pytest.approx(own[-1], rel=1e-5)
    assert own[-1] <= read["rollout/logp_gap_p99"] <= 1.08 * own[-1]  # fewer than 100 tokens: the largest is the 99th percentile

    point = moved(fake, np.random.default_rng(1))
    _, metrics = tabular.loss(bound, point, prepared)
    new = np.asarray(point.policy(batch.seqs).logps)
    largest = (new - old)[np.asarray(loss_tokens(prepared.seqs))].max()
    assert largest > 0.1
    for key in ("policy/ratio_max", "policy/ratio_p99"):
        assert np.exp(largest) * (1 - 1e-5) <= float(metrics[key].compute()) <= np.exp(1.08 * largest)
    ratio, sign, mask = np.exp(new - old), np.sign(np.asarray(prepared.advantages)), np.asarray(loss_tokens(prepared.seqs))
    expected = [((sign < 0) & (ratio < 0.8))[mask].mean(), ((sign > 0) & (ratio > 1.2))[mask].mean()]
    assert max(expected) > 0
    assert [float(metrics[f"policy/clip_frac_{side}"].compute()) for side in ("low", "high")] == pytest.approx(expected, rel=1e-5)
    assert float(metrics["policy/clip_frac"].compute()) == pytest.approx(sum(expected), rel=1e-5)
