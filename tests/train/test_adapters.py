"""Adapters through the whole loop: what trains, what checkpoints and optimizer hold, what moves by no bit, and a resume that is exact."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoint
from rlhf_jax.errors import UserError
from rlhf_jax.models import Networks, NetworkSpec, lora, quantise
from rlhf_jax.models.config import Lora
from rlhf_jax.saved import load_source
from rlhf_jax.train.assemble import assemble
from rlhf_jax.train.config import check
from rlhf_jax.train.loop import train
from rlhf_jax.train.start import split
from rlhf_jax.types import PyTree
from tests.models import tiny as networks
from tests.objectives.settings import bound
from tests.train import trainable
from tests.train.conftest import UNEVEN
from tests.train.runs import outcome, series, tiny
from tests.train.test_resume import POINTS, crash

Finished = Callable[[str], pathlib.Path]
ADAPTERS = {"tokenizer.kind": "inherit", "lora.rank": 2, "lora.alpha": 4.0, "optimizer.lr": 3e-3}
DROPPED = {"lora.dropout": 0.25, "lora.dora": True, "lora.base": "int8"}
# One config for each type of batch, and what its run adds.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"lora.rslora": True, "lora.targets": "query|value"}),
    "dpo": ("dpo", {**DROPPED, "validation.every": 0}),
    "kto": ("kto", {"lora.base": "bfloat16"}),
    "reward": ("reward", {}),
    "process_reward": ("process_reward", {}),
    "ppo": ("ppo", {"critic.kind": "separate", "critic.init_from": "policy"}),
    "grpo": ("grpo", {"lora.dora": True}),
}


def changes(name: str, finished: Finished) -> tuple[str, dict[str, Any]]:
    config, more = RUNS[name]
    return config, {**UNEVEN, **ADAPTERS, "init_from": str(finished("sft")), **more}


def flat(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves by "/"-joined path."""
    return {"/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def bytes_of(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "dpo" else pytest.mark.slow) for name in RUNS])
def test_only_adapters_and_new_heads_are_trained_and_saved(name: str, finished: Finished, tmp_path: pathlib.Path) -> None:
    """The checkpoint holds nothing else; with the base beside it, it is a whole network again, whose other leaves are the base's to the bit."""
    config, more = changes(name, finished)
    train(tiny(config, more), str(tmp_path / "run"))
    source, base = load_source(str(tmp_path / "run"), "init_from"), flat(load_source(str(finished("sft")), "init_from").params)
    saved = checkpoint.load_params(str(tmp_path / "run"), key="init_from")[0]
    heads = {"reward": {"ends/score_head/kernel"}, "process_reward": {"ends/score_head/kernel"}}.get(name, set())
    projections = set(source.config.lora.projections)
    for path in flat(saved[source.network]):
        assert path in heads or (path.split("/")[-1] in lora.LEAVES and path.split("/")[2] in projections), path
    if name == "ppo":
        critic = {path.rsplit("/", 2)[-1] if "head" not in path else path for path in flat(saved["critic"])}
        assert critic == {lora.A, lora.B, "ends/value_head/kernel", "ends/value_head/bias"}
    for path, leaf in flat(source.params).items():
        if path in base:
            np.testing.assert_array_equal(leaf, base[path], err_msg=path, strict=True)
        elif path.endswith(lora.B):
            assert np.abs(leaf).max() > 0, path
    if name in ("dpo", "kto"):
        assert abs(series(tmp_path / "run", "reward/margin")[0]) < 1e-4
    if name in ("ppo", "grpo"):
        assert abs(series(tmp_path / "run", "objective/kl")[0]) < 1e-4
    if name == "dpo":
        crashed_and_resumed(config, more, tmp_path)


def crashed_and_resumed(config: str, more: dict[str, Any], folder: pathlib.Path) -> None:
    """In step 4, after the checkpoint of step 2: the same end to the bit, dropout and quantised base included."""
    crash(config, more, folder / "again", POINTS["training"], 4)
    train(tiny(config, more), str(folder / "again"))
    assert outcome(folder / "again") == outcome(folder / "run")


def experiment(name: str, more: dict[str, Any]) -> Any:
    return assemble(*check(tiny(name, more)))


def test_the_optimizer_holds_what_trains(finished: Finished) -> None:
    """Two moments of each trained leaf, sharded as it, and nothing of the base; the reference costs nothing."""
    exp = experiment("dpo", {**ADAPTERS, "init_from": str(finished("sft")), "optimizer.name": "adamw", "lora.base": "int8"})
    trained, base = bytes_of(exp.start.abstract.params), bytes_of(exp.frozen["base"])
    assert {path.rsplit("/", 1)[1] for path in flat_shapes(exp.start.abstract.params)} == {lora.A, lora.B}
    assert 2 * trained <= bytes_of(exp.start.abstract.opt_state) <= 2 * trained + 64
    assert jax.tree.leaves(exp.frozen["ref"]) == []
    kernels = sum(into * out for into, out in lora.kernels(exp.spec.policy).values())
    codes = {path: leaf for path, leaf in flat(exp.frozen["base"]).items() if path.rsplit("/", 1)[1] in (quantise.CODES, quantise.SCALES)}
    assert sum(leaf.nbytes for path, leaf in codes.items() if path.endswith(quantise.CODES)) == kernels < base


def flat_shapes(tree: PyTree) -> list[str]:
    return ["/".join(entry.key for entry in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_a_fresh_base_does_not_move_by_one_bit(tmp_path: pathlib.Path) -> None:
    """Without a checkpoint to lie on, adapters are saved with the base that was drawn."""
    config = {"run.steps": 3, "validation.every": 0, "lora.rank": 2, "lora.dropout": 0.25, "optimizer.lr": 1e-2, "optimizer.weight_decay": 0.1}
    drawn = experiment("sft", config).start
    before = flat(drawn._made(drawn._base_leaves, drawn._base, drawn._base_at)["policy"])
    train(tiny("sft", config), str(tmp_path))
    after = load_source(str(tmp_path), "init_from")
    found = flat(after.params)
    assert len(before) > 8
    for path, leaf in before.items():
        wanted = leaf[0] if "scan" in path else leaf
        np.testing.assert_array_equal(found[re.sub(r"scan/\w+", "0", path)], wanted, err_msg=path)
    assert all(np.abs(leaf).max() > 0 for path, leaf in found.items() if path.endswith(lora.B))


@pytest.mark.slow
def test_microbatches_change_nothing() -> None:
    """An adapter's dropout belongs to rows: four microbatches give one batch's gradients."""
    settings = Lora(rank=2, alpha=4.0, targets="query|down", dropout=0.5, dora=True)
    config = networks.config(vocab_size=16, layers=1, lora=settings)
    trained, frozen = split({"policy": networks.params(config)}, lambda path: re.search(lora.TRAINABLE, path) is not None)
    read = lambda count: networks.jit(trainable.reading(bound("sft"), NetworkSpec(policy=config), count))(  # noqa: E731
        trained, {"base": frozen}, trainable.batch("sft"))
    found = read(4)
    trainable.same(found, read(1))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[0]))


@pytest.mark.slow
def test_adapters_go_on_or_are_merged(finished: Finished, tmp_path: pathlib.Path) -> None:
    """A run with the same adapters goes on with them, one with others starts on the merged network: at first both are the network that was saved."""
    first = {**ADAPTERS, "init_from": str(finished("sft")), "run.steps": 4}
    train(tiny("dpo", first), str(tmp_path / "first"))
    merged = load_source(str(tmp_path / "first"), "init_from").for_adapters(None)
    unrolled = dataclasses.replace(merged.config, scan_layers=False)
    whole = Networks({"policy": jax.tree.map(np.asarray, merged.params)}, {}, NetworkSpec(policy=unrolled))
    seqs = networks.rows(2, 12)
    for more, fresh in (({"lora.dropout": 0.25}, False), ({"lora.rank": 3}, True), ({"lora.rank": 0}, None)):
        exp = experiment("dpo", {**first, "init_from": str(tmp_path / "first"), **more})
        state = exp.start.state()
        nets = Networks(state.params, exp.frozen, exp.spec)
        for read in (nets.policy, nets.ref):
            np.testing.assert_allclose(read(seqs).logps, whole.policy(seqs).logps, atol=1e-4)
        b = [leaf for path, leaf in flat(state.params).items() if path.endswith(lora.B)]
        assert bool(b) == (fresh is not None) and all(leaf.any() != fresh for leaf in b)


def test_what_would_train_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"config\.lora\.targets = 'q_proj' is found in none of"):
        experiment("sft", {"lora.rank": 2, "lora.targets": "q_proj"})
    with pytest.raises(UserError, match=r"config\.lora\.base = 'int8' quantises a checkpoint's kernels"):
        experiment("sft", {"lora.rank": 2, "lora.base": "int8"})
    with pytest.raises(UserError, match=r"config\.lora\.base = 'nf4' needs kernels whose rows come in blocks of 64"):
        experiment("sft", {"lora.rank": 2, "lora.base": "nf4"})
