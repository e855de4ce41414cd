"""Scanned and unrolled layers are one network: same parameters, same numbers, and one saved layout, an optimizer's state included."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import layout, transformer
from rlhf_jax.train import optimizer
from tests.models import tiny
from tests.train import trainable

UNROLLED, SCANNED = tiny.BASE, tiny.config(scan_layers=True)
OPTIMIZER = {**trainable.OPTIMIZER, "ema_decay": 0.9}


def test_init_draws_the_same_parameters_in_both_layouts():
    unrolled, scanned = (tiny.jit(transformer.init, static_argnums=0)(c, jax.random.key(3)) for c in (UNROLLED, SCANNED))
    assert set(unrolled["layers"]) == {"0", "1"} and set(scanned["layers"]) == {"scan"}
    tiny.close(layout.to_canonical(scanned), unrolled, rtol=0, atol=0)


@pytest.mark.parametrize("scan", [False, True])
def test_to_runtime_and_back_is_the_identity(scan):
    params = tiny.params()
    runtime = layout.to_runtime(params, int(scan))
    tiny.close(layout.to_canonical(runtime), params, rtol=0, atol=0)
    tiny.close(layout.to_runtime(runtime, int(scan)), runtime, rtol=0, atol=0)
    assert jax.tree.structure(layout.to_canonical(runtime)) == jax.tree.structure(params)


def test_layers_are_stacked_in_the_order_of_numbers_not_of_strings():
    layers = {str(i): {"w": jnp.full((2,), i)} for i in range(11)}
    stacked = layout.to_runtime({"layers": layers}, 1)["layers"]["scan"]["0of1"]["w"]
    np.testing.assert_array_equal(stacked[:, 0], np.arange(11))
    assert layout.to_canonical({"layers": {"scan": {"0of1": {"w": stacked}}}})["layers"]["10"]["w"][0] == 10


def test_units_and_the_layers_that_make_none_are_stacked_apart_and_come_back_in_order():
    layers = {str(i): {"w": jnp.full((2,), i)} for i in range(7)}
    running = layout.to_runtime({"policy": {"layers": layers}}, 3)["policy"]["layers"]
    assert {k: np.asarray(v["w"][:, 0]).tolist() for k, v in running["scan"].items()} == {"0of3": [0, 3], "1of3": [1, 4], "2of3": [2, 5]}
    assert set(running) == {"scan", "6"}
    back = layout.to_canonical({"layers": running})["layers"]
    assert list(back) == [str(i) for i in range(7)] and all(back[str(i)]["w"][0] == i for i in range(7))
    again = layout.like({"policy": {"layers": back}, "n": jnp.ones(2)}, {"policy": {"layers": running}, "n": jnp.ones(2)})
    tiny.close(again["policy"]["layers"], running, rtol=0, atol=0)
    partial = layout.to_canonical({"layers": {"scan": {"1of3": running["scan"]["1of3"]}}})["layers"]
    assert {name: int(layer["w"][0]) for name, layer in partial.items()} == {"1": 1, "4": 4}
    one_kind = {"layers": {"scan": {"1of3": running["scan"]["1of3"]}}}
    tiny.close(layout.like({"layers": partial}, one_kind), one_kind, rtol=0, atol=0)


@pytest.mark.parametrize(("changes", "unit"), [
    ({}, 1), ({"scan_layers": False}, 0), ({"windows": (3, 0)}, 2), ({"windows": (3, 3, 0), "layers": 5}, 0),
    ({"windows": (3, 3, 0), "layers": 7}, 3),
    ({"experts": 2, "experts_per_token": 1, "expert_mlp": 4, "dense": (True, False)}, 2), ({"windows": (3, 3, 3, 3, 3, 0)}, 0), ({"layers": 1}, 0),
])
def test_the_unit_of_a_scan_is_the_shortest_period_of_the_layers_kinds(changes, unit):
    assert tiny.config(**{"layers": 6, "scan_layers": True, **changes}).unit == unit


def test_scanned_units_with_a_remainder_are_the_unrolled_network():
    changes = dict(layers=5, windows=(3, 0), experts=4, experts_per_token=2, expert_mlp=8, dense=(False, True), balance_coef=0.1)
    seqs, params = tiny.rows(3, 9), tiny.params(tiny.config(**changes))
    a, ga = loss_and_gradient(tiny.config(**changes), params, seqs, None)
    scanned = tiny.config(**changes, scan_layers=True)
    assert scanned.unit == 2
    b, gb = loss_and_gradient(scanned, layout.to_runtime(params, 2), seqs, None)
    tiny.close(a, b)
    tiny.near(layout.to_canonical(gb), ga)


@functools.partial(tiny.jit, static_argnums=0)
def loss_and_gradient(config, params, seqs, keys):
    return jax.value_and_grad(lambda p: -tiny.nets(config).replace(params={"policy": p}).policy(seqs, keys).logps.sum())(params)


def test_scanned_and_unrolled_layers_agree_in_loss_and_gradient_dropout_included():
    seqs, params = tiny.rows(3, 9), tiny.params()
    keys = jax.random.split(jax.random.key(1), 3)
    a, ga = loss_and_gradient(tiny.config(dropout=0.2), params, seqs, keys)
    b, gb = loss_and_gradient(tiny.config(dropout=0.2, scan_layers=True), layout.to_runtime(params, 1), seqs, keys)
    tiny.close(a, b)
    tiny.near(layout.to_canonical(gb), ga)


def test_logical_axes_fit_every_parameter_in_both_layouts():
    for config in (UNROLLED, SCANNED, tiny.config(tied=True, outputs=("lm", "value", "score"))):
        shapes = jax.eval_shape(lambda c=config: transformer.init(c, jax.random.key(0)))
        axes = transformer.logical_axes(config)
        names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
        assert [len(n) for n in names] == [len(s.shape) for s in jax.tree.leaves(shapes)]
        assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert transformer.logical_axes(SCANNED)["layers"]["scan"]["0of1"]["query"]["kernel"] == (None, "embed", "heads")
    assert transformer.logical_axes(UNROLLED)["layers"]["0"]["query"]["kernel"] == ("embed", "heads")


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("chosen", ["all", "norms"])
def test_an_optimizers_state_has_one_layout_too(name, chosen):
    """Update, save canonically, load into the other layout, update again: as if the layout had never changed."""
    tx, _ = optimizer.build({**OPTIMIZER, "name": name}, 10)

    def some(tree):
        if chosen == "all":
            return tree
        return {"ends": {"norm": tree["ends"]["norm"]}, "layers": {n: {k: x for k, x in layer.items() if "norm" in k}
                                                                    for n, layer in tree["layers"].items()}}

    @tiny.jit
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    stacked = lambda tree: layout.to_runtime(tree, 1)  # noqa: E731
    params = some(tiny.params())
    grads = [some(tiny.params(seed=s)) for s in (1, 2)]
    straight = update(*update(params, tx.init(params), grads[0]), grads[1])
    scanned = update(stacked(params), tx.init(stacked(params)), stacked(grads[0]))
    saved = layout.to_canonical(scanned)
    reloaded = stacked(saved)
    assert jax.tree.structure(reloaded) == jax.tree.structure(scanned)
    tiny.close(reloaded, scanned, rtol=0, atol=0)
    tiny.close(layout.to_canonical(update(*reloaded, stacked(grads[1])))[0], straight[0], rtol=1e-4, atol=1e-5)
    if chosen == "all" or name == "adamw":
        assert jax.tree.structure(saved) == jax.tree.structure(straight)
        tiny.close(layout.to_canonical(update(*saved, grads[1])), straight, rtol=1e-4, atol=1e-5)
