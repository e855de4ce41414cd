"""Quantised kernels: how far a code is from its weight, what is exact, what a network computes with them, and what they cost."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import distributed, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, layers, layout, lora, quantise, transformer
from rlhf_jax.models.adopt import adopt
from rlhf_jax.models.config import Lora
from rlhf_jax.types import Array, PyTree
from tests.models import tiny

KINDS = ["int8", "nf4"]
WIDE = tiny.config(layers=1, hidden=128, heads=8, kv_heads=4, head_dim=16, mlp=128)
SETTINGS = Lora(rank=2, alpha=4.0, targets="query|down")


def back(kernel: np.ndarray, kind: str, dtype: Any = np.float32) -> np.ndarray:
    return quantise.read(quantise.write(kernel, kind), dtype)


# --- one kernel ---


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4), st.floats(-30, 30))
def test_no_weight_is_further_than_half_a_gap_from_its_code(seed: int, blocks: int, out: int, power: float) -> None:
    rng = np.random.default_rng(seed)
    kernel = (rng.standard_t(3, size=(64 * blocks, out)) * 2.0**power).astype(np.float32)
    gap = np.abs(kernel - back(kernel, "int8"))
    assert (gap <= (0.5 + 1e-5) * quantise.write(kernel, "int8")[quantise.SCALES]).all()
    parts = quantise.write(kernel, "nf4")
    gap = np.abs(kernel - quantise.read(parts, np.float32)).reshape(blocks, 64, out)
    widest = np.diff(quantise.LEVELS).max()
    assert (gap <= (widest / 2 + 1e-6) * parts[quantise.SCALES][:, None]).all()


def test_every_code_is_the_nearest_level() -> None:
    kernel = np.random.default_rng(0).normal(size=(128, 3)).astype(np.float32)
    blocks = kernel.reshape(2, 64, 3)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = quantise.LEVELS[np.abs(blocks[..., None] / scales[..., None] - quantise.LEVELS).argmin(-1)] * scales
    np.testing.assert_array_equal(back(kernel, "nf4"), nearest.reshape(kernel.shape))


def test_what_codes_stand_for_is_kept_exactly() -> None:
    """Kernels made of levels, of whole multiples, and of zeros; the largest weight of a block always."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (3, 64, 5))
    codes[:, 0] = 15  # a block's largest is level 1
    scales = np.exp(rng.normal(size=(3, 1, 5))).astype(np.float32)
    kernel = (quantise.LEVELS[codes] * scales).reshape(-1, 5)
    np.testing.assert_array_equal(back(kernel, "nf4"), kernel)
    whole = rng.integers(-127, 128, (64, 5)).astype(np.float32)
    whole[0] = 127
    np.testing.assert_array_equal(back(whole * 0.5, "int8"), whole * 0.5)
    for kind in KINDS:
        zeros = np.zeros((64, 3), np.float32)
        zeros[:, 1] = rng.normal(size=64)
        assert not back(zeros, kind)[:, [0, 2]].any() and back(zeros, kind)[:, 1].any()
    normal = rng.normal(size=(64, 7)).astype(np.float32)
    largest = np.abs(normal).argmax(0), np.arange(7)
    np.testing.assert_array_equal(back(normal, "nf4")[largest], normal[largest])
    np.testing.assert_allclose(back(normal, "int8")[largest], normal[largest], rtol=1e-6)


def test_two_rows_share_a_byte_the_even_one_above() -> None:
    kernel = np.zeros((64, 1), np.float32)
    kernel[0], kernel[1] = 1.0, -1.0
    codes = quantise.write(kernel, "nf4")[quantise.CODES]
    assert codes.dtype == np.uint8 and codes[0, 0] == 0xF0 and (codes[1:] == 0x77).all()


@pytest.mark.parametrize("kind", KINDS)
def test_reading_on_the_host_and_on_a_device_agree(kind: str) -> None:
    parts = quantise.write(np.random.default_rng(0).normal(size=(128, 6)).astype(np.float32), kind)
    for dtype in (jnp.float32, jnp.bfloat16):
        device = tiny.jit(functools.partial(quantise.read, dtype=dtype))(jax.tree.map(jnp.asarray, parts))
        np.testing.assert_array_equal(np.asarray(device), quantise.read(parts, dtype), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_is_quantised_in_slabs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """…of bfloat16 as of float32, with the same codes however many rows a slab has."""
    kernel = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(320, 3)), jnp.bfloat16))
    whole = quantise.write(kernel.astype(np.float32), kind)
    monkeypatch.setattr(quantise, "STEP", 400)  # two blocks of 64 rows and 3 columns
    for name, part in quantise.write(kernel, kind).items():
        np.testing.assert_array_equal(part, whole[name], strict=True)


def test_what_cannot_be_quantised_is_refused() -> None:
    for kind in KINDS:
        for value in (np.nan, np.inf, -np.inf):
            kernel = np.ones((64, 2), np.float32)
            kernel[3, 1] = value
            with pytest.raises(UserError, match=f"config.lora.base = '{kind}'.*an infinity or a NaN"):
                quantise.write(kernel, kind)
    with pytest.raises(UserError, match="blocks of 64, and one has 96: use 'int8'"):
        quantise.leaves("nf4", (96, 8), ("embed", None))


# --- linear maps in a scan ---

DEPTH, WIDTH = 3, 128  # every kernel has two blocks of rows


def linear(kind: str) -> layers.Linear:
    return layers.Linear(dataclasses.replace(WIDE, lora=SETTINGS, quantise=kind), WIDTH, ("embed", "heads"), name="query")


def stack(kind: str, depth: int = DEPTH, seed: int = 0) -> tuple[PyTree, PyTree]:
    """Adapters and frozen leaves of `depth` maps, stacked."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (rng.normal(size=(depth, *shape)) / np.sqrt(shape[0])).astype(np.float32)  # noqa: E731
    kernels = draw(WIDTH, WIDTH)
    made = [quantise.write(kernel, kind) if kind != "none" else {"kernel": kernel} for kernel in kernels]
    return {lora.A: draw(WIDTH, 2), lora.B: draw(2, WIDTH)}, jax.tree.map(lambda *leaves: np.stack(leaves), *made)


def loss(kind: str, trained: PyTree, frozen: PyTree, x: Array) -> Array:
    def body(x: Array, leaves: PyTree) -> tuple[Array, None]:
        return layers.pin(jnp.tanh(linear(kind).apply({"params": leaves}, x))), None

    return jnp.square(jax.lax.scan(body, x, {**trained, **frozen})[0]).sum()


INPUTS = np.random.default_rng(7).normal(size=(8, 3, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_kernels(kind: str) -> None:
    """Only adapters are differentiated: the integers beside them need no gradient."""
    trained, frozen = stack(kind)
    kernels = {"kernel": np.stack([quantise.read(jax.tree.map(lambda x, i=i: x[i], frozen), np.float32) for i in range(DEPTH)])}
    found = tiny.jit(jax.value_and_grad(functools.partial(loss, kind)))(trained, frozen, INPUTS)
    tiny.near(found, tiny.jit(jax.value_and_grad(functools.partial(loss, "none")))(trained, kernels, INPUTS))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_kernel_is_kept_for_the_backward_pass(kind: str) -> None:
    """What further layers add to the step's temporaries is less than half a byte a weight; kernels kept in float32 would be four."""
    temporary = []
    for depth in (2, 8):
        program = tiny.jit(jax.grad(functools.partial(loss, kind))).lower(*stack(kind, depth), INPUTS[:1]).compile()
        temporary.append(program.memory_analysis().temp_size_in_bytes)
    assert temporary[1] - temporary[0] < 6 * WIDTH * WIDTH / 2


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_codes_are_gathered_as_codes(kind: str) -> None:
    """…and give one device's loss and gradients. Two devices split nf4's two blocks of rows at their edge."""
    trained, frozen = stack(kind)
    on = distributed.make_mesh({axis: 2 if axis in ("fsdp", "tensor") else 1 for axis in distributed.AXES}, 4)
    axes = {name: layout.Axes((None, *names)) for name, (_, _, names) in quantise.leaves(kind, (WIDTH, WIDTH), ("embed", "heads")).items()}
    where = sharding.parameter_shardings(on, axes, frozen)
    assert tuple(where[quantise.CODES].spec) == (None, "fsdp", "tensor")
    assert tuple(where[quantise.SCALES].spec) == (None, None if kind == "int8" else "fsdp", "tensor")
    expected = tiny.jit(jax.value_and_grad(functools.partial(loss, kind)))(trained, frozen, INPUTS)
    with tiny.uncached():
        arguments = trained, jax.device_put(frozen, where), jax.device_put(INPUTS, sharding.row_sharding(on))
        program = sharding.jit(jax.value_and_grad(functools.partial(loss, kind)), on).lower(*arguments).compile(tiny.QUICK)
        tiny.near(program(*arguments), expected)
    gathered: dict[str, int] = {}
    for dtype, shape in re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", program.as_text()):
        gathered[dtype] = max(gathered.get(dtype, 0), int(np.prod([int(n) for n in shape.split(",")])))
    dtype, rows = {"int8": ("s8", WIDTH), "nf4": ("u8", WIDTH // 2)}[kind]
    assert gathered[dtype] == rows * WIDTH // 2  # half the columns
    assert gathered.get("f32", 0) < WIDTH * WIDTH // 2  # no kernel, nor half of one


# --- a network ---


@functools.cache
def frozen(kind: str) -> tuple[ModelConfig, PyTree]:
    """WIDE with adapters on quantised kernels, canonical, as a run starts it: codes by `adopt`; no adapter is zero."""
    config = dataclasses.replace(WIDE, lora=SETTINGS, quantise=kind)
    rng = np.random.default_rng(0)
    draw = lambda leaf: (1.0 if leaf.ndim == 1 else leaf.shape[0] ** -0.5) * rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    drawn = jax.tree.map(draw, abstract(dataclasses.replace(WIDE, lora=SETTINGS)))
    return config, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), adopt(abstract(config), drawn, config))


def abstract(config: ModelConfig) -> PyTree:
    return jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_kernels_and_of_the_merged_ones(kind: str) -> None:
    config, params = frozen(kind)
    seqs = tiny.rows(3, 9)
    found = tiny.logits(config, params, seqs)
    whole = dataclasses.replace(config, quantise="none"), quantise.dequantised(params)
    merged = dataclasses.replace(config, quantise="none", lora=None), lora.merged(params, SETTINGS)
    for network, leaves in (whole, merged):
        assert jax.tree.map(np.shape, leaves) == jax.tree.map(np.shape, abstract(network))
        np.testing.assert_allclose(tiny.logits(network, jax.tree.map(np.asarray, leaves), seqs), found, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("kind", "most"), [("int8", 1 + 4 / 128), ("nf4", 0.5 + 4 / 64)])
def test_bytes_of_the_resident_base(kind: str, most: float) -> None:
    """Of kernels; embeddings and norms stay as they are."""
    leaves = jax.tree_util.tree_leaves_with_path(frozen(kind)[1]["layers"])
    held = sum(leaf.nbytes for path, leaf in leaves if path[-1].key in (quantise.CODES, quantise.SCALES))
    assert held == most * sum(into * out for into, out in lora.kernels(WIDE).values())


def test_a_mesh_that_would_split_a_block_is_refused() -> None:
    config = dataclasses.replace(WIDE, lora=SETTINGS, quantise="nf4")
    on = distributed.make_mesh({axis: 4 if axis == "fsdp" else 1 for axis in distributed.AXES}, 4)
    with pytest.raises(UserError, match=r"config\.mesh\.fsdp = 4 does not divide the 2 of axis 'embed' in .*'scales'"):
        sharding.parameter_shardings(on, transformer.logical_axes(config), abstract(config))
