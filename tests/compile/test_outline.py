"""A run outlined from its config has the shapes and shardings of the run itself, and every program of it lowers."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import pytest

from rlhf_jax import distributed
from rlhf_jax.compile.measure import shard_bytes
from rlhf_jax.compile.outline import outline
from rlhf_jax.compile.programs import programs
from rlhf_jax.errors import UserError
from rlhf_jax.train.assemble import assemble
from rlhf_jax.train.config import check
from rlhf_jax.train.programs import Programs
from tests.train.runs import tiny

EIGHT = {"mesh.devices": 8, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "run.batch_size": 16}


def outlined(config: Any) -> tuple[Any, list[str]]:
    checked, objective = check(config, files=False)
    section = checked["mesh"]
    mesh = distributed.make_mesh({axis: section[axis] for axis in distributed.AXES}, section["devices"])
    return outline(checked, objective, mesh)


def shapes(tree: Any) -> list[Any]:
    return [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype, leaf.sharding) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "ppo", "grpo"])
def test_the_outline_is_the_runs(name: str) -> None:
    config = tiny(name, EIGHT)
    exp, notes = outlined(config)
    real = assemble(*check(config))
    assert not notes and shapes(Programs(exp).abstract()) == shapes(Programs(real).abstract())
    assert shapes(exp.frozen) == shapes(real.frozen)
    assert jax.tree.structure(exp.batch(0)) == jax.tree.structure(real.batch(0).replace(**_everywhere(real.batch(0))))


def _everywhere(batch: Any) -> dict[str, Any]:
    """The outline reads the head everywhere, the largest case."""
    return {name: getattr(batch, name).replace(loss_positions=None) for name in ("seqs", "kl_seqs") if hasattr(batch, name)} or (
        {"loss_positions": None} if hasattr(batch, "loss_positions") else {})


@pytest.mark.parametrize(("name", "changes", "names"), [
    ("sft", {}, ["step", "update"]),
    ("dpo", {}, ["step", "prepare", "update"]),
    ("ppo", {"reward_fn": "", "reward_from": "nowhere/reward"}, ["iteration", "prefill", "decode", "score", "prepare", "update"]),
    ("grpo", {"fused": False}, ["rollout", "step", "prefill", "decode", "prepare", "update"]),
])
def test_every_program_lowers(name: str, changes: dict[str, Any], names: list[str]) -> None:
    exp, notes = outlined(tiny(name, {**EIGHT, **changes}))
    found = programs(exp)
    assert [one.name for one in found] == names
    assert len(notes) == ("reward_from" in changes)
    for one in found:
        assert "func.func public @main" in one.lower().as_text()[:4000], one.name


def test_what_lies_beside_a_program_is_what_it_is_not_given() -> None:
    exp, _ = outlined(tiny("ppo", {**EIGHT, "reward_fn": "", "reward_from": "nowhere/reward"}))
    state, by_name = Programs(exp).abstract(), {one.name: one for one in programs(exp)}
    everything = shard_bytes((state, exp.frozen))
    prefill = by_name["prefill"]
    own = shard_bytes(prefill.args[:2])
    assert shard_bytes(prefill.beside) + own == everything, "the policy and frozen networks are arguments, critic and optimizer lie beside"
    assert shard_bytes(by_name["iteration"].beside) == 0


def test_an_architecture_that_nobody_has_is_refused(tmp_path: pathlib.Path) -> None:
    config = tiny("sft", {"model.family": "inherit", "init_from": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match=r"config\.init_from.*config\.model\.family = 'inherit'"):
        outlined(config)
