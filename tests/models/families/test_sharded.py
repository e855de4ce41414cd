"""Import, one gradient step and export on eight devices give what they give on one, for every family."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import distributed, sharding
from rlhf_jax.models import ModelConfig, Networks, NetworkSpec, families, layout
from rlhf_jax.saved import load_source, place
from rlhf_jax.train.step import gradients
from rlhf_jax.types import PyTree
from tests.models import tiny
from tests.models.families import golden
from tests.objectives.settings import bound

MESHES = {"dense": {"fsdp": 4, "tensor": 2}, "sparse": {"fsdp": 2, "tensor": 2, "expert": 2}}
CI = ("llama", "mixtral")


def form(family: str) -> ModelConfig:
    """A small network of a family's own form, whose every axis a mesh divides."""
    fresh = families.fresh(family)
    windows = tuple(5 if window else 0 for window in fresh.pop("windows", (0,))[-3:])
    config = dataclasses.replace(tiny.BASE, **fresh, family=family, windows=windows, layers=2 * len(windows) + 1, vocab_size=24, scan_layers=True)
    if family in ("gpt2", "gpt_neox"):
        config = dataclasses.replace(config, kv_heads=config.heads)
    if config.position == "learned":
        config = dataclasses.replace(config, positions=64)
    if "balance_coef" in fresh:
        config = dataclasses.replace(config, experts=4, experts_per_token=2, expert_mlp=24)
    return config


def trained(given: Path, folder: Path, axes: dict[str, int], devices: int) -> tuple[PyTree, PyTree]:
    """Opens `given` on a mesh, takes a step of SFT, exports to `folder`: the exported parameters, and how much of each one device held."""
    mesh = distributed.make_mesh(axes, devices)
    source = load_source(str(given), "--model")
    config = dataclasses.replace(source.config, logits_chunk=0)
    params = {"policy": place(source.params, config, mesh)}
    seqs = distributed.to_global(tiny.rows(8, 10, vocabulary=24), sharding.row_sharding(mesh))

    def step(params: PyTree, seqs: Any) -> PyTree:
        nets = Networks(params, {}, NetworkSpec(policy=config))
        grads, _ = gradients(bound("sft"), nets, seqs, jax.random.split(jax.random.key(0), 8), 1)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

    where = jax.tree.map(lambda x: x.sharding, params)
    after = sharding.jit(step, mesh, out_shardings=where).lower(params, seqs).compile(tiny.QUICK)(params, seqs)["policy"]
    golden.export(folder, config, after, source.meta["longest"])
    held = jax.tree.map(lambda x: x.addressable_shards[0].data.size / x.size, after)
    return jax.tree.map(np.asarray, load_source(str(folder), "--model").params), held


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name in CI else pytest.mark.slow) for name in families.names()])
def test_a_step_between_import_and_export_is_that_of_one_device(family, tmp_path):
    config = form(family)
    params = layout.to_canonical(tiny.params(config))
    golden.export(tmp_path / "given", config, params, 64)
    with tiny.uncached():
        many, held = trained(tmp_path / "given", tmp_path / "many", MESHES["sparse" if config.experts else "dense"], 8)
        one, _ = trained(tmp_path / "given", tmp_path / "one", {}, 1)
    change = functools.partial(jax.tree.map, lambda new, old: new - np.asarray(old), is_leaf=lambda x: isinstance(x, jnp.ndarray | np.ndarray))
    updates = change(one, params)
    tiny.near(change(many, params), updates, 1e-4)
    unmoved = [path for path, update in tiny.canonical(updates).items() if np.abs(update).max() < 1e-5]
    assert all("key" in path and "bias" in path and config.position == "learned" for path in unmoved), unmoved  # without rotation no matter
    layer = next(iter(held["layers"][layout.SCAN].values()))
    assert (layer["experts"]["down"] if config.experts else layer["output"]["kernel"]) == 1 / 8
