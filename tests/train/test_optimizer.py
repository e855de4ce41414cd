"""The optimizer: schedules by hand, decay that spares norms and biases, clipping, Muon in both layouts, EMA, refused updates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import layout
from rlhf_jax.train import optimizer
from tests.models import tiny
from tests.train.trainable import OPTIMIZER

PARAMS = {"policy": tiny.params(tiny.config(outputs=("lm", "value"), layers=2))}


def build(total: int = 10, **changes):
    return optimizer.build({**OPTIMIZER, **changes}, total)


def updated(tx, params, grads, state=None):
    """(parameters, state, updates) after one update."""

    @tiny.jit
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return update(params, tx.init(params) if state is None else state, grads)


# --- schedules ---


def rates(total: int, count: int, **changes) -> list[float]:
    rate = optimizer.schedule({**OPTIMIZER, "lr": 1.0, **changes}, total)
    return [float(rate(n)) for n in range(count)]


def test_schedules_have_the_values_one_derives_by_hand():
    assert rates(10, 3) == [1.0, 1.0, 1.0]
    assert rates(10, 6, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    linear = rates(10, 12, schedule="linear", warmup_steps=2, end_lr_ratio=0.2)
    assert linear == pytest.approx([0.5, *(1 - 0.1 * n for n in range(9)), 0.2, 0.2], abs=1e-6)
    assert linear[9] == pytest.approx(0.2)  # the last update of the run has the last rate
    cosine = rates(9, 9, schedule="cosine", warmup_steps=1, end_lr_ratio=0.1)
    assert cosine == pytest.approx([0.1 + 0.9 * (1 + np.cos(np.pi * n / 8)) / 2 for n in range(9)], abs=1e-6)


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
def test_the_first_rate_is_positive_and_the_peak_is_the_rate_asked_for(name, warmup):
    found = rates(10, 10, schedule=name, warmup_steps=warmup, end_lr_ratio=0.0)
    assert found[0] > 0 and max(found) == pytest.approx(1.0) and np.argmax(found) == max(warmup - 1, 0)
    assert all(np.diff(found[: max(warmup, 1)]) > 0)


def test_a_warm_up_longer_than_the_run_is_no_crash():
    assert rates(3, 3, schedule="linear", warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])


def test_unknown_names_are_one_sentence():
    with pytest.raises(UserError, match=r"config\.optimizer\.schedule = 'step': must be one of constant, linear, cosine"):
        build(schedule="step")
    with pytest.raises(UserError, match=r"config\.optimizer\.name = 'sgd': must be one of adamw, muon"):
        build(name="sgd")


# --- updates ---


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("scan", [False, True])
def test_weight_decay_spares_norms_and_biases(name, scan):
    """With zero gradients decay is all that moves a parameter: p ← p · (1 − lr · decay)."""
    params = layout.to_runtime(PARAMS, int(scan))
    tx, _ = build(name=name, lr=0.1, weight_decay=0.5)
    new, _, _ = updated(tx, params, jax.tree.map(jnp.zeros_like, params))
    seen = {True: 0, False: 0}
    for path, old in tiny.canonical(params).items():
        spared = path.endswith(("['scale']", "['bias']"))
        seen[spared] += 1
        np.testing.assert_allclose(tiny.canonical(new)[path], old if spared else old * 0.95, rtol=1e-6, atol=1e-7, err_msg=path)
    assert seen[True] >= 4 and seen[False] >= 10
    assert {path for path, yes in tiny.canonical(optimizer.decays(params)).items() if not yes} == {
        path for path in tiny.canonical(params) if path.endswith(("['scale']", "['bias']"))
    }


def test_adamw_is_the_papers_update():
    """Loshchilov & Hutter 2019, algorithm 2, two steps of one parameter in float64."""
    tx, _ = build(lr=0.1, weight_decay=0.3, clip_norm=0.0, b1=0.8, b2=0.9, eps=1e-3)
    params, state = {"kernel": jnp.float32([[2.0]])}, None
    x, m, v = 2.0, 0.0, 0.0
    for step, g in enumerate((0.5, -2.0), 1):
        params, state, _ = updated(tx, params, {"kernel": jnp.float32([[g]])}, state)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        x -= 0.1 * (m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.9**step)) + 1e-3) + 0.3 * x)
        assert float(params["kernel"][0, 0]) == pytest.approx(x, rel=1e-5)


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adam():
    tx, _ = build(name="muon", lr=1.0, weight_decay=0.0, clip_norm=0.0)
    grads = {"policy": tiny.params(tiny.config(outputs=("lm", "value")), 3)}
    _, state, updates = updated(tx, PARAMS, grads)
    kernel = np.asarray(updates["policy"]["layers"]["0"]["query"]["kernel"])
    singular = np.linalg.svd(kernel, compute_uv=False)
    assert singular.max() / singular.min() < 3  # the gradient's own are far apart
    given = np.linalg.svd(np.asarray(grads["policy"]["layers"]["0"]["query"]["kernel"]), compute_uv=False)
    assert given.max() / given.min() > 10
    assert np.sqrt((kernel**2).mean()) == pytest.approx(0.2, rel=0.25)  # the RMS of an AdamW update
    embedding = np.asarray(updates["policy"]["ends"]["embedding"])
    # Adam's first step is the gradient's sign; optax gives Muon's Adam part Nesterov momentum (Dozat 2016), b1/(1 + b1) more.
    np.testing.assert_allclose(embedding, -np.sign(grads["policy"]["ends"]["embedding"]) * (1 + 0.9 / 1.9), rtol=1e-3)
    assert any(isinstance(leaf, optax.MaskedNode) for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.MaskedNode)))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_scanned_and_unrolled_layers_get_the_same_updates(name):
    tx, _ = build(name=name, lr=0.1, weight_decay=0.1, ema_decay=0.9)
    params, scanned, state, scanned_state = PARAMS, layout.to_runtime(PARAMS, 1), None, None
    for seed in (1, 2):
        grads = {"policy": tiny.params(tiny.config(outputs=("lm", "value")), seed)}
        params, state, _ = updated(tx, params, grads, state)
        scanned, scanned_state, _ = updated(tx, scanned, layout.to_runtime(grads, 1), scanned_state)
    tiny.close(layout.to_canonical(scanned), params, rtol=1e-4, atol=1e-5)
    tiny.close(layout.to_canonical(scanned_state), state, rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": {"kernel": jnp.zeros((1, 2))}, "b": {"kernel": jnp.zeros((1, 1))}}
    grads = {"a": {"kernel": jnp.float32([[3.0, 0.0]])}, "b": {"kernel": jnp.float32([[4.0]])}}

    def second_moment(clip):
        _, state, _ = updated(build(clip_norm=clip, b2=0.0, weight_decay=0.0)[0], params, grads)
        return optax.tree.get(state, "nu")

    tiny.close(second_moment(1.0), jax.tree.map(lambda g: (g / 5.0) ** 2, grads))
    tiny.close(second_moment(10.0), jax.tree.map(jnp.square, grads))
    tiny.close(second_moment(0.0), jax.tree.map(jnp.square, grads))  # 0 = off


def test_the_moving_average_follows_the_parameters_and_is_what_evaluation_reads():
    tx, _ = build(ema_decay=0.75, lr=0.1)
    params, average, state = PARAMS, PARAMS, None
    for seed in (1, 2, 3):
        grads = {"policy": tiny.params(tiny.config(outputs=("lm", "value")), seed)}
        params, state, _ = updated(tx, params, grads, state)
        average = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, average, params)
    tiny.close(optimizer.evaluation_params(params, state), average, rtol=1e-5, atol=1e-6)
    assert np.abs(average["policy"]["ends"]["embedding"] - params["policy"]["ends"]["embedding"]).max() > 1e-2
    without = build()[0]
    assert optimizer.evaluation_params(params, without.init(params)) is params


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_with_a_non_finite_gradient_changes_nothing_but_the_counters(bad):
    tx, _ = build(ema_decay=0.5, weight_decay=0.1)
    grads = {"policy": tiny.params(tiny.config(outputs=("lm", "value")), 1)}
    params, state, _ = updated(tx, PARAMS, grads)
    broken = jax.tree.map(lambda g: g, grads)
    broken["policy"]["ends"]["norm"] = {"scale": grads["policy"]["ends"]["norm"]["scale"].at[3].set(bad)}
    after, skipped, _ = updated(tx, params, broken, state)
    tiny.close(after, params, rtol=0, atol=0)
    tiny.close(skipped.inner_state, state.inner_state, rtol=0, atol=0)
    assert (int(skipped.total_notfinite), int(skipped.notfinite_count), bool(skipped.last_finite)) == (1, 1, False)
    good, resumed, _ = updated(tx, after, grads, skipped)
    straight, _, _ = updated(tx, params, grads, state)
    tiny.close(good, straight, rtol=0, atol=0)
    assert (int(resumed.total_notfinite), int(resumed.notfinite_count), bool(resumed.last_finite)) == (1, 0, True)


def test_moments_may_be_bfloat16():
    state = build(moment_dtype="bfloat16")[0].init(PARAMS)
    dtypes = {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "mu"))}
    assert dtypes == {jnp.dtype("bfloat16")}
