"""Experts: the sum in the docstring, one token at a time; no token dropped; neighbours, accumulation and meshes change nothing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import distributed, sharding
from rlhf_jax.models import Networks, NetworkSpec, layout, moe, transformer
from rlhf_jax.train.step import gradients
from rlhf_jax.types import Mean
from tests.models import tiny

SPARSE = tiny.config(experts=4, experts_per_token=2, expert_mlp=8, balance_coef=0.1)


def by_hand(x: np.ndarray, router: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, k: int, renormalise: bool) -> np.ndarray:
    """One token, float64."""
    logits = x @ router
    p = np.exp(logits - logits.max())
    p /= p.sum()
    chosen = sorted(range(len(p)), key=lambda e: -p[e])[:k]
    total = sum(p[e] for e in chosen) if renormalise else 1.0
    silu = lambda y: y / (1 + np.exp(-y))  # noqa: E731
    return sum(p[e] / total * ((silu(x @ gate[e]) * (x @ up[e])) @ down[e]) for e in chosen)


@pytest.mark.parametrize(("count", "k", "renormalise"), [(4, 2, True), (5, 3, False), (3, 1, True), (4, 4, False)])
def test_the_sum_of_the_chosen_experts(count, k, renormalise):
    rng = np.random.default_rng(0)
    x, router = rng.normal(size=(13, 6)), rng.normal(size=(6, count))
    gate, up, down = rng.normal(size=(count, 6, 5)), rng.normal(size=(count, 6, 5)), rng.normal(size=(count, 5, 6))
    args = [jnp.asarray(y, jnp.float32) for y in (x, gate, up, down)]
    weights, experts, _ = moe.route(args[0] @ jnp.asarray(router, jnp.float32), k, renormalise)
    got = moe.mix(args[0], weights, experts, *args[1:], "silu")
    want = np.stack([by_hand(row, router, gate, up, down, k, renormalise) for row in x])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    halves = [moe.mix(args[0], weights, experts, *(y[part] for y in args[1:]), "silu", first=part.start)
              for part in (slice(0, 1), slice(1, count)) if part.start < count]
    np.testing.assert_allclose(sum(halves), want, rtol=1e-4, atol=1e-5)


def test_all_tokens_to_one_expert_drop_none():
    weights, experts = jnp.ones((64, 1)), jnp.full((64, 1), 2)
    eye = jnp.stack([jnp.eye(3)] * 4) * jnp.arange(4.0)[:, None, None]
    x = jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)), jnp.float32))
    np.testing.assert_allclose(moe.mix(x, weights, experts, eye, eye, eye, "relu"), (2 * x) * (2 * x) * 2, rtol=1e-5)


def test_neighbours_never_change_a_logit():
    seqs, params = tiny.rows(6, 9), tiny.params(SPARSE)
    whole = tiny.logits(SPARSE, params, seqs)
    for part in (slice(0, 1), slice(2, 5)):
        np.testing.assert_allclose(tiny.logits(SPARSE, params, jax.tree.map(lambda x: x[part], seqs)), whole[part], rtol=1e-5, atol=1e-5)  # noqa: B023


def test_the_balance_loss_is_each_sequences_own():
    """E Σ f P by hand, a packed row's two sequences and padding included; the same sequence alone has the same."""
    rng = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 0, 0, 0]])
    chosen, p = rng.integers(0, 2, (2, 6, 4)).astype(np.float32), rng.random((2, 6, 4)).astype(np.float32)
    chosen[1, :3], p[1, :3] = chosen[0, :3], p[0, :3]
    got = np.asarray(moe.balance(jnp.asarray(chosen), jnp.asarray(p), jnp.asarray(segments)))
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        at = segments[row] == segment
        want = 4 * sum(chosen[row, at, e].mean() * p[row, at, e].mean() for e in range(4))
        assert got[row, at].sum() == pytest.approx(want, rel=1e-5)
    assert got[0, :3].sum() == pytest.approx(got[1, :3].sum()) and not got[segments == 0].any()
    even = moe.balance(jnp.full((1, 6, 4), 0.5), jnp.full((1, 6, 4), 0.25), jnp.ones((1, 6), int))
    assert float(even.sum()) == pytest.approx(2.0), "k, where choices and probabilities are even"


class Likelihood:
    """An objective that knows nothing of experts."""

    @staticmethod
    def loss(nets, batch, keys):
        return {"nll": Mean.of(-nets.policy(batch, keys).logps, batch.segment_ids != 0)}, {}


@functools.partial(tiny.jit, static_argnums=(0, 2))
def accumulated(config, params, microbatches, seqs):
    nets = Networks({"policy": params}, {}, NetworkSpec(policy=config))
    return gradients(Likelihood, nets, seqs, jax.random.split(jax.random.key(0), seqs.tokens.shape[0]), microbatches)


def test_the_step_adds_the_balance_loss_to_any_objective_and_accumulation_changes_nothing():
    seqs, params = tiny.rows(8, 9), tiny.params(SPARSE)
    grads, metrics = accumulated(SPARSE, params, 1, seqs)
    again, same = accumulated(SPARSE, params, 4, seqs)
    tiny.near(again, grads, 1e-5)
    sequences = sum(len(set(row[row > 0].tolist())) for row in np.asarray(seqs.segment_ids))
    assert float(metrics["loss/balance"].count) == float(same["loss/balance"].count) == sequences
    _, losses = transformer.balanced_trunk(SPARSE, params, seqs.tokens, seqs.positions, seqs.segment_ids)
    assert float(metrics["loss/balance"].compute()) == pytest.approx(0.1 * float(losses.sum()) / sequences, rel=1e-4)
    assert float(metrics["loss"].compute()) == pytest.approx(float(metrics["loss/nll"].compute() + metrics["loss/balance"].compute()), rel=1e-5)
    off, unbalanced = accumulated(dataclasses.replace(SPARSE, **{"balance_coef": 0.0}), params, 1, seqs)
    assert "loss/balance" not in unbalanced
    router = [np.asarray(g["layers"]["0"]["router"]["kernel"]) for g in (grads["policy"], off["policy"])]
    assert np.abs(router[0] - router[1]).max() > 1e-6


@pytest.mark.parametrize("sizes", [{"expert": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "expert": 2}])
def test_experts_spread_over_a_mesh_are_the_same_network(sizes):
    mesh = distributed.make_mesh(sizes)
    seqs, params = tiny.rows(8, 9), tiny.params(SPARSE)
    want, metrics = accumulated(SPARSE, params, 1, seqs)
    shapes = jax.eval_shape(lambda: {"policy": transformer.init(SPARSE, jax.random.key(0))})
    where = sharding.parameter_shardings(mesh, {"policy": transformer.logical_axes(SPARSE)}, shapes)
    assert "expert" in str(where["policy"]["layers"]["0"]["experts"]["gate"].spec)
    placed = jax.device_put({"policy": params}, where), jax.device_put(seqs, sharding.row_sharding(mesh))

    def run(params, seqs):
        nets = Networks(params, {}, NetworkSpec(policy=SPARSE))
        return gradients(Likelihood, nets, seqs, jax.random.split(jax.random.key(0), 8), 1)

    with tiny.uncached():
        got, found = sharding.jit(run, mesh)(*placed)
    tiny.near(got["policy"], want["policy"], 2e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name].compute(), value.compute(), rtol=1e-5)


def test_wrong_shapes_are_refused():
    x = jnp.ones((3, 4))
    for call in (
        lambda: moe.route(x[None], 1, True),
        lambda: moe.mix(x, jnp.ones((3, 2)), jnp.ones((3, 1), int), *[jnp.ones((2, 4, 4))] * 3, "silu"),
        lambda: moe.balance(x, x, jnp.ones((1, 3), int)),
    ):
        with pytest.raises(AssertionError):
            call()


def test_a_layer_without_experts_among_those_with():
    config = dataclasses.replace(SPARSE, **{"layers": 3, "dense": (True, False, False)})
    tree = layout.to_canonical(transformer.init(config, jax.random.key(0)))
    assert ["router" in tree["layers"][str(i)] for i in range(3)] == [False, True, True]
    assert set(tree["layers"]["1"]["experts"]) == {"gate", "up", "down"} and "gate" in tree["layers"]["0"]
