"""Label smoothing, DFT, NEFTune, distillation and PPO-ptx: values by hand, the limits that make one the other, and what training moves."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.errors import UserError
from rlhf_jax.models import Networks, NetworkSpec
from rlhf_jax.objectives import dft, ppo, ppo_ptx, sft
from rlhf_jax.objectives._distillation import response_weights
from rlhf_jax.ops.distillation import forward_kl, generalised_jsd, reverse_kl
from rlhf_jax.ops.masking import loss_tokens, masked_sum
from rlhf_jax.types import Mean
from tests.models import tiny
from tests.objectives import tabular
from tests.objectives.settings import V, bound, config, moved, random_batch

ON_POLICY = ("on_policy_gkd", "on_policy_reverse_kl")
DISTILLATIONS = ("forward_kl", "reverse_kl", "gkd", *ON_POLICY)


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def batch_of(name, **kwargs):
    return random_batch(bound(name).batch_type, np.random.default_rng(1), packed=False, **kwargs)


# --- maximum likelihood with other weights ---


def test_a_smoothed_label_by_hand():
    """Three tokens of probability ½, ¼, ¼; the label is the first: −0.7 log ½ − 0.1 (log ½ + 2 log ¼)."""
    fake = tabular.TabularNets({"policy": jnp.log(jnp.array([[0.5, 0.25, 0.25]] * 3))}, {})
    batch = jax.tree.map(lambda x: x[:, :2], tabular.sequences(np.random.default_rng(0), (1, 8), 3))
    batch = batch.replace(tokens=jnp.array([[2, 0]]), segment_ids=jnp.ones((1, 2), jnp.int32), loss_mask=jnp.ones((1, 2), bool))
    terms, _ = tabular.loss(objectives.bind({"name": "sft", "label_smoothing": 0.3, "z_loss": 0.0}), fake, batch)
    assert float(tabular.value(terms)) == pytest.approx((0.7 + 0.1 + 0.4) * math.log(2), rel=1e-6)
    assert float(terms["nll"].compute()) == pytest.approx(math.log(2), rel=1e-6)  # comparable with a run without smoothing


def test_a_uniform_policy_minimises_the_fully_smoothed_loss():
    rng = np.random.default_rng(0)
    fake, batch = tabular.nets(rng, V), tabular.sequences(rng, (4, 8), V)
    whole = objectives.bind({"name": "sft", "label_smoothing": 1.0, "z_loss": 0.0})
    after = tabular.descend(whole, fake, batch, steps=300, rate=2.0)
    assert float(tabular.value(tabular.loss(whole, after, batch)[0])) == pytest.approx(math.log(V), abs=1e-4)


def test_dfts_gradient_is_sfts_times_the_probability():
    logps = jnp.log(jnp.array([[0.9, 0.1, 1e-6]]))
    slopes = jax.grad(lambda x: dft.dft_loss(x).sum())(logps)
    close(slopes, -jnp.exp(logps))
    close(jax.grad(lambda x: sft.nll_loss(x).sum())(logps) * jnp.exp(logps), slopes)
    assert jnp.isfinite(dft.dft_loss(jnp.full((1, 1), -1e4))).all()


def test_of_two_answers_dft_settles_on_the_commoner_where_sft_keeps_both():
    """Its gradient is that of the mean probability, which all mass on the mode maximises."""
    fake = tabular.TabularNets({"policy": jnp.zeros((3, 3))}, {})
    batch = tabular.sequences(np.random.default_rng(0), (4, 8), 3)
    batch = jax.tree.map(lambda x: x[:, :2], batch).replace(
        tokens=jnp.array([[0, 1], [0, 1], [0, 1], [0, 2]]), segment_ids=jnp.ones((4, 2), jnp.int32), loss_mask=jnp.ones((4, 2), bool))
    ends = {}
    for name in ("sft", "dft"):
        after = tabular.descend(objectives.bind({"name": name, **objectives.load(name).DEFAULTS}), fake, batch, steps=400, rate=2.0)
        ends[name] = jax.nn.softmax(after.params["policy"][0])
    close(ends["sft"], jnp.array([0.0, 0.75, 0.25]), atol=5e-3)
    close(ends["dft"], jnp.array([0.0, 1.0, 0.0]), atol=2e-2)


def noisy(rows=6):
    rng = np.random.default_rng(2)
    chosen, fake, batch = bound("neftune"), tabular.nets(rng, V), tabular.sequences(rng, (rows, 8), V, filler=True)
    return chosen, fake, batch, jax.random.split(jax.random.key(0), rows)


def test_noise_is_split_with_the_batch():
    chosen, fake, batch, keys = noisy()
    read = jax.jit(lambda batch, keys: chosen.loss(fake, batch, keys)[0]["nll"])
    parts = [read(*jax.tree.map(lambda x, i=i: x[i::2], (batch, keys))) for i in range(2)]
    close(parts[0].merge(parts[1]), read(batch, keys))
    assert abs(float(read(batch, keys).compute() - read(batch, jax.random.split(jax.random.key(1), 6)).compute())) > 1e-3


def test_without_keys_or_alpha_neftune_is_sft():
    _, fake, batch, keys = noisy()
    plain, _ = tabular.loss(objectives.bind({"name": "sft", "label_smoothing": 0.0, "z_loss": 0.0}), fake, batch)
    assert chosen_nll(fake, batch, None, 5.0) == chosen_nll(fake, batch, keys, 0.0) == float(plain["nll"].compute())


def chosen_nll(fake, batch, keys, alpha):
    objective = objectives.bind({"name": "neftune", "noise_alpha": alpha})
    return float(jax.jit(objective.loss)(fake, batch, keys)[0]["nll"].compute())


# --- divergences ---


def pair(seed=0, shape=(3, 4, 7)):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for _ in range(2))


def test_two_coins_by_hand():
    """S = (½, ½), T = (¼, ¾), M = (3/8, 5/8)."""
    student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75])) + 3.0  # logits: a constant is nothing
    assert float(forward_kl(student, teacher)) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-5)
    assert float(reverse_kl(student, teacher)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
    to_teacher = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    to_student = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    assert float(generalised_jsd(student, teacher, beta=0.5)) == pytest.approx(0.5 * (to_teacher + to_student), rel=1e-5)


def test_the_even_mixture_is_symmetric_and_bounded():
    student, teacher = pair()
    jsd = functools.partial(generalised_jsd, beta=0.5)
    close(jsd(student, teacher), jsd(teacher, student))
    apart = jnp.array([60.0, 0.0, 0.0]), jnp.array([0.0, 60.0, 0.0])
    assert float(jsd(*apart)) == pytest.approx(math.log(2), rel=1e-5)
    assert float(generalised_jsd(*apart, beta=0.1)) == pytest.approx(-0.1 * math.log(0.1) - 0.9 * math.log(0.9), rel=1e-5)


def test_scaled_limits_of_the_jsd_are_the_two_kls():
    """First order in β: at 10⁻³ within a percent of values below one nat."""
    student, teacher = (x / 2 for x in pair())
    close(generalised_jsd(student, teacher, beta=1e-3) / 1e-3, forward_kl(student, teacher), rtol=1e-2)
    close(generalised_jsd(student, teacher, beta=1 - 1e-3) / 1e-3, reverse_kl(student, teacher), rtol=1e-2)
    close(forward_kl(student, teacher), reverse_kl(teacher, student))


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, functools.partial(generalised_jsd, beta=0.3)])
def test_a_divergence_from_oneself_is_nothing_and_has_no_slope(divergence):
    _, teacher = pair()
    close(divergence(teacher, teacher), jnp.zeros((3, 4)), atol=1e-6)
    close(jax.grad(lambda s: divergence(s, teacher).sum())(teacher), jnp.zeros_like(teacher), atol=1e-6)
    for student in (teacher.at[..., 0].add(200.0), teacher.at[..., 1].set(-jnp.inf)):  # certain; a token ruled out, in both
        others = jnp.where(jnp.isinf(student), student, teacher)
        value, slope = jax.value_and_grad(lambda s: divergence(s, others).sum())(student)  # noqa: B023
        assert jnp.isfinite(value) and jnp.isfinite(slope).all()
    assert divergence(teacher.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)).dtype == jnp.float32
    with pytest.raises(AssertionError):
        divergence(teacher, teacher[..., :3])


# --- distillation ---


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_a_student_like_its_teacher_has_nothing_to_learn(name):
    fake = tabular.nets(np.random.default_rng(0), V, moved=0.0)
    value, slopes = tabular.objective(bound(name), fake, batch_of(name))
    assert abs(float(value)) < 1e-6 and float(jnp.abs(slopes["policy"]).max()) < 1e-6


def test_a_response_weighs_one_however_long_and_packed():
    rng = np.random.default_rng(3)
    rows = tabular.sequences(rng, (4, 8), V, filler=True)
    weights = response_weights(rows)
    close(weights.sum(-1), jnp.array([1.0, 1.0, 1.0, 0.0]))
    assert (np.asarray(weights > 0) == np.asarray(loss_tokens(rows))).all()
    packed = jax.tree.map(lambda x: x[:2].reshape(1, -1), rows.replace(segment_ids=rows.segment_ids * jnp.arange(1, 5)[:, None]))
    close(response_weights(packed), weights[:2].reshape(1, -1))
    chosen, fake = bound("gkd"), tabular.nets(rng, V)
    close(tabular.objective(chosen, fake, packed), tabular.objective(chosen, fake, jax.tree.map(lambda x: x[:2], rows)))


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_the_sampling_temperature_is_apart_from_the_distillations(name):
    fake, batch = tabular.nets(np.random.default_rng(0), V), batch_of(name)
    close(tabular.objective(bound(name), fake, batch), tabular.objective(bound(name), fake.replace(temperature=0.5), batch))
    hotter = objectives.bind(config(name, temperature=3.0))
    halved = fake.replace(params={**fake.params, "policy": fake.params["policy"] / 2}, frozen={"ref": fake.frozen["ref"] / 2})
    cooler = objectives.bind(config(name, temperature=1.5))
    close(tabular.objective(hotter, fake, batch)[0], tabular.objective(cooler, halved, batch)[0])


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_the_student_becomes_its_teacher(name):
    """On every prefix that the batch holds; on-policy rows stay as they were sampled."""
    fake, batch = tabular.nets(np.random.default_rng(4), V), batch_of(name, rows=12)
    objective = objectives.bind(config(name, temperature=1.0))
    after = tabular.descend(objective, fake, batch, steps=400, rate=4.0)
    values = [float(tabular.value(tabular.loss(objective, nets, batch)[0])) for nets in (fake, after)]
    assert values[0] > 0.01 and values[1] < 0.05 * values[0]
    seqs = getattr(batch, "seqs", batch)
    apart = [jnp.abs(nets.policy(seqs).logps - nets.ref(seqs).logps)[loss_tokens(seqs)].mean() for nets in (fake, after)]
    assert apart[1] < 0.2 * apart[0]


TEACHER = tiny.config(layers=1, hidden=8, heads=2, kv_heads=1)


def real(chunk=0, teacher=TEACHER, temperature=1.0):
    spec = NetworkSpec(policy=tiny.config(layers=1, logits_chunk=chunk), ref=teacher, temperature=temperature)
    return Networks({"policy": tiny.params(spec.policy)}, {"ref": tiny.params(teacher, 3)}, spec)


@functools.partial(tiny.jit, static_argnums=0)
def reading(objective, nets, batch):
    return jax.value_and_grad(lambda p: tabular.value(objective.loss(nets.replace(params=p), batch, None)[0]))(nets.params)


def test_gkd_of_two_transformers_whole_and_in_chunks_at_loss_positions():
    """A teacher of another size; by hand from both networks' whole logits; the same in chunks, with the head on some positions only."""
    seqs = tiny.rows(4, 9)
    seqs = seqs.replace(loss_mask=seqs.loss_mask & (jnp.arange(9) % 3 != 1)[None])
    nets, objective = real(temperature=0.7), objectives.bind({"name": "gkd", "beta": 0.3, "temperature": 2.0})
    value, slopes = reading(objective, nets, seqs)
    student, teacher = (tiny.logits(c, p, seqs) / 2.0 for c, p in
                        ((nets.spec.policy, nets.params["policy"]), (TEACHER, nets.frozen["ref"])))
    after = generalised_jsd(student, teacher, beta=0.3)
    before = jnp.concatenate([after[:, :1], after[:, :-1]], axis=1)
    assert float(value) == pytest.approx(float(Mean.of(before, response_weights(seqs)).compute()), rel=1e-4)
    mask = np.asarray(loss_tokens(seqs))
    positions = np.zeros((4, mask.sum(-1).max()), np.int32)
    for row, at in zip(positions, mask):
        row[: at.sum()] = np.flatnonzero(at)
    found, found_slopes = reading(objective, real(2, temperature=0.7), seqs.replace(loss_positions=jnp.asarray(positions)))
    assert float(found) == pytest.approx(float(value), rel=1e-5)
    tiny.near(found_slopes, slopes)


def test_a_teacher_of_another_vocabulary_is_refused():
    objective = objectives.bind({"name": "forward_kl", "temperature": 1.0})
    with pytest.raises(UserError, match=r"config\.reference_from.*23 entries.*17"):
        jax.eval_shape(lambda nets, batch: objective.loss(nets, batch, None), real(teacher=tiny.config(vocab_size=23)), tiny.rows(2, 5))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_jsd_that_is_nothing_is_refused(beta):
    with pytest.raises(UserError, match=r"config\.objective\.beta"):
        objectives.bind({"name": "gkd", "beta": beta, "temperature": 1.0})


# --- PPO with a second data set ---


def test_ptx_adds_the_likelihood_of_the_second_data_set():
    rng = np.random.default_rng(0)
    chosen, fake = bound("ppo_ptx"), tabular.nets(rng, V)
    batch = tabular.with_reference(fake, random_batch(chosen.batch_type, rng))
    prepared, carry, _ = tabular.prepare(chosen, fake, batch)
    after = moved(fake, rng)
    plain = objectives.bind({"name": "ppo", **{key: chosen.hyperparameters[key] for key in ppo.DEFAULTS}})
    plainly, plain_carry, _ = tabular.prepare(plain, fake, batch)
    close((prepared.advantages, carry), (plainly.advantages, plain_carry))
    terms, slopes = tabular.loss(chosen, after, prepared)[0], tabular.objective(chosen, after, prepared)[1]
    likelihood = objectives.bind({"name": "sft", "label_smoothing": 0.0, "z_loss": 0.0})
    nll, nll_slopes = tabular.objective(likelihood, after, batch.ptx)
    assert float(terms.pop("ptx").compute()) == pytest.approx(0.7 * float(nll), rel=1e-5)
    close(terms, tabular.loss(plain, after, prepared)[0])
    close(slopes["policy"], tabular.objective(plain, after, prepared)[1]["policy"] + 0.7 * nll_slopes["policy"])


def test_ptx_without_its_rows_is_refused_and_with_coefficient_0_needs_none():
    chosen = bound("ppo_ptx")
    fake = tabular.nets(np.random.default_rng(0), V)
    batch = tabular.with_reference(fake, batch_of("ppo_ptx")).replace(ptx=None)
    with pytest.raises(UserError, match=r"config\.ptx"):
        tabular.loss(chosen, fake, tabular.prepare(chosen, fake, batch)[0])
    off = objectives.bind(config("ppo_ptx", ptx_coef=0.0))
    assert "ptx" in chosen.needs and "ptx" not in off.needs
    assert "ptx" not in tabular.loss(off, fake, tabular.prepare(off, fake, batch)[0])[0]
    assert ppo_ptx.DEFAULTS["ptx_coef"] == 27.8


def test_ptx_keeps_the_second_data_set_likely_while_the_score_rises():
    """The score asks for token 1; the second data set never says it. Without the ptx term it gets ever less likely, with it likelier."""
    fake = tabular.nets(np.random.default_rng(5), V, moved=0.0)
    ptx = tabular.sequences(np.random.default_rng(6), (64, 7), V)
    ptx = ptx.replace(tokens=jnp.where(ptx.tokens == 1, 0, ptx.tokens))

    def trained(coefficient):
        objective = objectives.bind(config("ppo_ptx", ptx_coef=coefficient))

        @jax.jit
        def iterate(params, carry, key):
            nets = fake.replace(params=params)
            seqs = tabular.sample(nets, key, 64, 6)
            score = (seqs.tokens[:, 1:] == 1).mean(-1).astype(jnp.float32)
            batch = tabular.with_reference(fake, tabular.scored(seqs, score, group=4).replace(ptx=ptx))
            batch, carry, _ = objective.prepare(nets, batch, carry, key)
            grads = jax.grad(lambda p: tabular.value(objective.loss(fake.replace(params=p), batch, None)[0]))(params)
            return jax.tree.map(lambda p, g: p - 5.0 * g, params, grads), carry, score.mean()

        params, carry, scores = fake.params, objective.init_carry(fake), []
        for step in range(30):
            params, carry, score = iterate(params, carry, jax.random.key(step))
            scores.append(float(score))
        likelihood = [float(masked_sum(nets.policy(ptx).logps, loss_tokens(ptx)).sum()) for nets in (fake, fake.replace(params=params))]
        return np.mean(scores[-5:]) - np.mean(scores[:2]), likelihood[1] - likelihood[0]

    alone, mixed = trained(0.0), trained(0.2)
    assert alone[0] > 0.2 and alone[1] < -1.0
    assert mixed[0] > 0.05 and mixed[1] > 1.0
