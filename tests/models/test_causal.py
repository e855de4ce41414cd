"""Every way in which whole rows attend is the plain one, gradients included: packing, padding, windows, soft caps, odd lengths; which is taken."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from rlhf_jax import distributed, sharding
from rlhf_jax.models import Networks, NetworkSpec, attention, causal, kernels, transformer
from tests.models import tiny

T, HEADS, GROUPS, DIM = 40, 4, 2, 8
HOW = causal.How(0.25, 0, 0.0)


@functools.cache
def drawn(length: int = T, dtype: str = "float32") -> tuple[Any, ...]:
    """Queries, keys, values, a weight for each output, and segments: padding on both sides, one and two segments, padding alone."""
    rng = np.random.default_rng(0)
    half = (length - 5) // 2
    ids = np.stack([np.repeat([0, 1, 2, 0], [3, half, length - 5 - half, 2]), np.repeat([1, 0], [length - 4, 4]), np.zeros(length)])
    arrays = [jnp.asarray(rng.normal(size=(3, length, heads, DIM)), dtype) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return *arrays, jnp.asarray(ids, jnp.int32)


def plain(query, key, value, segment_ids, how):
    mask = attention.within(attention.visibility(segment_ids), 0, how.window)
    return attention.attend(query, key, value, mask, scale=how.scale, softcap=how.softcap)


def reading(fn, length: int = T):
    """Outputs of the real slots, and the gradients of a weighted sum of them."""
    *arrays, weight, ids = drawn(length)

    def loss(query, key, value):
        out = jnp.where((ids != 0)[:, :, None, None], fn(query, key, value, ids), 0.0)
        return (out * weight).sum(), out

    grads, out = tiny.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, grads


WAYS = {
    "stairs": lambda how: lambda *x: causal.stairs(*x, how, size=7),
    "stairs of whole blocks": lambda how: lambda *x: causal.stairs(*x, how, size=10),
    "blocks": lambda how: lambda *x: causal.blocks(*x, 0, how, size=9),
    "one block": lambda how: lambda *x: causal.blocks(*x, 0, how),
}


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (6, 3.0), (13, 0.0), (64, 3.0)])
@pytest.mark.parametrize("way", WAYS)
def test_parts_are_the_whole(way: str, window: int, softcap: float) -> None:
    how = HOW._replace(window=window, softcap=softcap)
    tiny.near(reading(WAYS[way](how)), reading(lambda *x: plain(*x, how)), 2e-6)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), pytest.param(60, 3.0, marks=pytest.mark.slow)])
def test_splash_attention_is_the_plain_one(window: int, softcap: float) -> None:
    """Interpreted, two blocks of 128 slots, the second one padded."""
    how = HOW._replace(window=window, softcap=softcap)
    found = reading(lambda *x: kernels.splash(*x, **how._asdict(), interpret=True), 150)
    tiny.near(found, reading(lambda *x: plain(*x, how), 150), 5e-6)


def test_what_padding_holds_reaches_no_slot() -> None:
    *arrays, _, ids = drawn()
    pads = (ids == 0)[:, :, None, None]
    for way in WAYS.values():
        run = tiny.jit(way(HOW))
        clean, soiled = (run(*(jnp.where(pads, fill, x) for x in arrays), ids) for fill in (0.0, 1e3))
        np.testing.assert_array_equal(np.where(pads, 0, clean), np.where(pads, 0, soiled))
        assert np.isfinite(soiled).all()


# --- which is taken ---


@pytest.mark.parametrize(
    ("platform", "length", "dtype", "softcap", "taken"),
    [
        ("cpu", 127, "float32", 0.0, "blocks"), ("cpu", 128, "float32", 0.0, "stairs"), ("tpu", 512, "bfloat16", 3.0, "splash"),
        ("tpu", 100, "bfloat16", 0.0, "blocks"), ("tpu", 512, "float16", 0.0, "blocks"), ("gpu", 512, "bfloat16", 0.0, "cudnn"),
        ("gpu", 512, "float32", 0.0, "blocks"), ("gpu", 512, "bfloat16", 3.0, "blocks"), ("gpu", 511, "bfloat16", 0.0, "blocks"),
        ("gpu", 8192, "bfloat16", 0.0, "blocks"), ("metal", 512, "bfloat16", 0.0, "blocks"),
    ],
)
def test_the_platform_and_the_shape_choose(platform, length, dtype, softcap, taken, monkeypatch):
    monkeypatch.setattr(causal, "platform", lambda: platform)
    query = jnp.zeros((1, length, HEADS, DIM), dtype)
    assert causal.method(query, query[:, :, :GROUPS], HOW._replace(softcap=softcap)) == taken


def test_a_mesh_that_does_not_divide_the_rows_has_no_kernel(monkeypatch):
    monkeypatch.setattr(causal, "platform", lambda: "tpu")
    taken = []

    def ask(query):
        taken.append(causal.method(query, query[:, :, :GROUPS], HOW))
        return query.sum()

    on = distributed.make_mesh({"data": 2, "tensor": 2}, 4)
    for shape in ((4, 512, HEADS, DIM), (3, 512, HEADS, DIM), (4, 512, 3, DIM)):
        jax.eval_shape(sharding.jit(ask, on), jnp.zeros(shape))
    assert taken == ["splash", "blocks", "blocks"]


SMALL = tiny.config(hidden=32, layers=3, windows=(40, 0), attention_softcap=5.0, remat="full", context=2048)


def nll(config, params, seqs):
    """Of rows of real networks."""
    return -Networks({"policy": params}, {}, NetworkSpec(policy=config)).policy(seqs).logps.sum()


def shapes(jaxpr) -> set[tuple[int, ...]]:
    """Of everything that a program computes, inner programs included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {variable.aval.shape for variable in equation.outvars}
        for inner in jax.core.jaxprs_in_params(equation.params):
            found |= shapes(inner)
    return found


@pytest.mark.parametrize(("platform", "length"), [("cpu", 512), ("gpu", 1024)])
def test_no_array_of_a_training_pass_is_as_long_as_the_row_twice(platform, length, monkeypatch):
    monkeypatch.setattr(causal, "platform", lambda: platform)
    found = shapes(jax.make_jaxpr(jax.grad(functools.partial(nll, SMALL)))(tiny.params(SMALL), tiny.rows(2, length)).jaxpr)
    assert any(length in shape for shape in found)
    assert not [shape for shape in found if sum(size >= length for size in shape) > 1]


def test_a_trunk_in_steps_is_the_trunk(monkeypatch):
    run = lambda: tiny.jit(jax.value_and_grad(functools.partial(nll, SMALL)))(tiny.params(SMALL), tiny.rows(4, 30))  # noqa: E731
    whole = run()
    monkeypatch.setattr(causal, "LONG", 8)
    monkeypatch.setattr(causal, "STAIR", 8)
    tiny.near(run(), whole)


def test_a_trunk_compiles_for_a_tpu_with_the_kernel_and_without_a_square(monkeypatch):
    """8 heads of 128, 2 of keys, 1024 slots, forward and gradient, for four chips of a v5e, rows and heads split."""
    pytest.importorskip("libtpu")
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(name, value)
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
    sizes = [2 if axis in ("fsdp", "tensor") else 1 for axis in distributed.AXES]
    on = Mesh(devices.reshape(sizes), distributed.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    config = tiny.config(vocab_size=256, hidden=256, heads=8, kv_heads=2, head_dim=128, mlp=256, context=1024, layers=2, compute_dtype="bfloat16",
                         scan_layers=True, remat="full", logits_chunk=256)
    params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    params = jax.tree.map(sharding.placed, params, sharding.parameter_shardings(on, transformer.logical_axes(config), params))
    seqs = jax.tree.map(lambda x: sharding.placed(x, sharding.row_sharding(on)), tiny.rows(4, 1024))
    program = sharding.jit(jax.grad(functools.partial(nll, config)), on).lower(params, seqs).compile().as_text()
    assert program.count("tpu_custom_call") >= 3 and "1024,1024]" not in program
