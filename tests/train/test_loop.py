"""A run from its config to its last file: one trace, validation and early stopping, where networks start, what stays frozen, the log."""

from __future__ import annotations

import json
import logging
import math
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoint
from rlhf_jax.errors import UserError
from rlhf_jax.models import layout
from rlhf_jax.saved import load_source
from rlhf_jax.train import loop
from rlhf_jax.train.assemble import assemble
from rlhf_jax.train.config import check
from rlhf_jax.train.loop import Result, train
from rlhf_jax.train.metric_names import is_standard
from rlhf_jax.train.programs import Programs
from tests.train.runs import metrics, outcome, rows, series, steps, tiny, write_rows

QUICK = {"validation.every": 0, "run.steps": 2}
NAMES = ["sft", "lm", "reward", "dpo", "ppo", "grpo"]


def sft(folder: pathlib.Path, changes: dict[str, Any] | None = None) -> Result:
    return train(tiny("sft", changes), str(folder))


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def saved(folder: pathlib.Path, which: Any = "latest") -> dict[str, np.ndarray]:
    """A checkpoint's parameters by path."""
    return leaves(checkpoint.load_params(str(folder), key="test", which=which)[0])


def started(name: str, changes: dict[str, Any]) -> dict[str, np.ndarray]:
    """The first state's parameters by path, in the canonical layout."""
    return leaves(layout.to_canonical(assemble(*check(tiny(name, changes))).start.state().params))


def rerun(name: str, changes: dict[str, Any], folder: pathlib.Path) -> None:
    """Loses the newest checkpoint and runs again: everything comes out as before."""
    before = outcome(folder)
    shutil.rmtree(folder / "checkpoints" / str(max(steps(folder / "checkpoints"))))
    (folder / "final.json").unlink()
    train(tiny(name, changes), str(folder))
    assert outcome(folder) == before


# --- one program ---


@pytest.mark.parametrize(
    ("name", "changes", "program"),
    [
        ("sft", {}, "step"),
        ("sft", {"mesh.data": 2, "mesh.devices": 2}, "step"),
        ("grpo", {}, "step"),
        ("ppo", {"reward_from": "@", "reward_fn": "", "reward_normalise": True, "mesh.fsdp": 2, "mesh.devices": 2}, "iteration"),
    ],
)
def test_traced_and_compiled_once(
    name: str, changes: dict[str, Any], program: str, finished: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Start-up's trace on shapes serves the run: one trace, one compilation of the train step, on one device and on several."""
    changes = {key: str(finished("reward")) if value == "@" else value for key, value in changes.items()}
    made: list[Programs] = []

    class Recorded(Programs):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(loop, "Programs", Recorded)
    caplog.set_level(logging.WARNING)
    caplog.clear()
    with jax.log_compiles():
        train(tiny(name, {"run.steps": 3, "validation.every": 2, **changes}), str(tmp_path))
    assert [programs.compilations() for programs in made] == [1]
    lines = [record.getMessage() for record in caplog.records]
    assert sum(f"Finished XLA compilation of jit({program})" in line for line in lines) == 1


def test_a_second_trace_is_noticed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_jax.data.batches import SequenceData

    original = SequenceData.batch

    def shrinking(self: SequenceData, index: int, seed: int) -> Any:
        batch = original(self, index, seed)
        return batch if index < 2 else jax.tree.map(lambda x: x[:, : x.shape[1] // 2], batch)

    monkeypatch.setattr(SequenceData, "batch", shrinking)
    with pytest.raises(AssertionError, match="compiled twice"):
        sft(tmp_path)


@pytest.mark.slow
def test_seed_decides(finished: Any, tmp_path: pathlib.Path) -> None:
    result = json.loads((finished("sft") / "final.json").read_text())
    again = sft(tmp_path / "again")
    other = sft(tmp_path / "other", {"seed": 1})
    assert again.state_hash == result["state_hash"]
    assert outcome(tmp_path / "again") == outcome(finished("sft"))
    assert other.state_hash != result["state_hash"]
    assert series(tmp_path / "other", "loss/nll") != series(finished("sft"), "loss/nll")


# --- the log ---


@pytest.mark.parametrize("name", NAMES)
def test_metric_names_are_standard(name: str, finished: Any) -> None:
    lines = metrics(finished(name))
    names = {key for line in lines for key in line} - {"step"}
    assert [key for key in names if not is_standard(key)] == []
    assert {"optimizer/lr", "optimizer/grad_norm", "optimizer/skipped", "optimizer/nonfinite_run", "data/tokens"} <= names
    assert all(line["tokens_per_second"] > 0 for line in rows(finished(name) / "timing.jsonl"))
    assert any(key.startswith("loss/") for key in names) and any(key.startswith("eval/") for key in names)
    assert all(math.isfinite(float(value)) for line in lines for value in line.values())


def test_log_and_checkpoint_may_change(finished: Any, tmp_path: pathlib.Path) -> None:
    """How often a run writes is no part of what it computes: a resumed run may change it, and the state is the same."""
    changes = {"log.every": 3, "log.tensorboard": True, "checkpoint.every": 3, "checkpoint.keep": 1}
    result = sft(tmp_path, changes)
    assert [line["step"] for line in metrics(tmp_path) if "loss/nll" in line] == [3, 4]
    assert steps(tmp_path / "checkpoints") == [4]
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert result.state_hash == json.loads((finished("sft") / "final.json").read_text())["state_hash"]
    assert sft(tmp_path, {"log.every": 2}).state_hash == result.state_hash
    assert json.loads((tmp_path / "config.json").read_text())["log"]["every"] == 2


# --- validation ---


def test_early_stopping_and_the_best_checkpoint(tmp_path: pathlib.Path) -> None:
    """With a falling loss to be maximised the first validation is the best one, and patience runs out two later."""
    changes = {"validation.every": 1, "validation.mode": "max", "validation.patience": 2, "run.steps": 8, "checkpoint.keep": 9}
    result = sft(tmp_path, changes)
    values = series(tmp_path, "eval/loss/nll")
    assert values == sorted(values, reverse=True) and len(values) == 3
    assert (result.step, result.stopped, result.best_step) == (3, "early", 1)
    assert result.best_value == pytest.approx(values[0])
    assert steps(tmp_path / "best") == [1]
    assert sft(tmp_path, changes) == result, "a stopped run stays stopped"
    assert len(series(tmp_path, "loss/nll")) == 3

    best, latest = saved(tmp_path, "best"), saved(tmp_path)
    assert all(np.array_equal(best[path], leaf) for path, leaf in saved(tmp_path, 1).items())
    assert any(not np.array_equal(best[path], latest[path]) for path in best)
    opened = started("sft", {"init_from": str(tmp_path / "best")})
    assert opened.keys() == best.keys()
    assert all(np.array_equal(opened[path], leaf) for path, leaf in best.items())


def test_patience_starts_anew_with_every_improvement(finished: Any) -> None:
    """A falling loss, to be minimised, never exhausts a patience of one."""
    run = finished("sft")
    values = series(run, "eval/loss/nll")
    assert values == sorted(values, reverse=True) and len(values) == 2
    final = json.loads((run / "final.json").read_text())
    assert (final["stopped"], final["best_step"], steps(run / "best")) == ("finished", 4, [4])


def test_validation_leaves_training_alone(finished: Any, tmp_path: pathlib.Path) -> None:
    result = sft(tmp_path, {"validation.every": 0})
    assert result.state_hash == json.loads((finished("sft") / "final.json").read_text())["state_hash"]
    assert (result.best_step, result.best_value) == (None, None)
    assert not (tmp_path / "best").exists()
    assert series(tmp_path, "loss/nll") == series(finished("sft"), "loss/nll")


def test_preempted(finished: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is taken away in step 2: that step is saved although no save was due, and the same call goes on from it."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpointer, "reached_preemption", lambda self, step: step == 2)
        result = sft(tmp_path, {"checkpoint.every": 0})
    assert (result.step, result.stopped, steps(tmp_path / "checkpoints")) == (2, "preempted", [2])
    assert sft(tmp_path, {"checkpoint.every": 0}).stopped == "finished"
    assert outcome(tmp_path) == outcome(finished("sft"))


# --- where networks start ---


def test_reward_model_from_sft(finished: Any) -> None:
    """The trunk is taken over, the vocabulary head left, a score head drawn with std 1/√(d + 1)."""
    source = saved(finished("sft"))
    found = started("reward", {"init_from": str(finished("sft"))})
    trunk = {path.replace("policy", "reward"): leaf for path, leaf in source.items() if "lm_head" not in path}
    heads = found.keys() - trunk.keys()
    assert trunk.keys() < found.keys() and heads and all("score_head" in path for path in heads)
    assert all(np.array_equal(found[path], leaf) for path, leaf in trunk.items())
    (kernel,) = (found[path] for path in heads if "kernel" in path)
    assert 0.4 < kernel.std() * math.sqrt(kernel.size + 1) < 1.6


def test_dpo_starts_at_its_reference(finished: Any, tmp_path: pathlib.Path) -> None:
    """With policy = reference the loss is log 2 and every margin 0; a step later neither."""
    train(tiny("dpo", {**QUICK, "init_from": str(finished("sft"))}), str(tmp_path))
    assert series(tmp_path, "loss/dpo")[0] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("reward/margin", "reward/chosen", "reward/rejected"):
        assert series(tmp_path, name)[0] == pytest.approx(0, abs=1e-6)
    assert series(tmp_path, "loss/dpo")[1] != pytest.approx(math.log(2), abs=1e-6)
    first = series(tmp_path, "logps/chosen")[0]

    # The reference named as a run is the same reference.
    train(tiny("dpo", {**QUICK, "init_from": str(finished("sft")), "reference_from": str(finished("sft"))}), str(tmp_path / "named"))
    assert series(tmp_path / "named", "loss/dpo") == pytest.approx(series(tmp_path, "loss/dpo"), abs=1e-6)
    assert series(tmp_path / "named", "logps/chosen")[0] == pytest.approx(first, rel=1e-6)


TWO_LAYERS = {"model.layers": 2}


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("scanned")
    sft(folder, {**QUICK, **TWO_LAYERS, "model.scan_layers": True})
    return folder


def test_scanned_run_resumes(scanned: pathlib.Path) -> None:
    rerun("sft", {**QUICK, **TWO_LAYERS, "model.scan_layers": True}, scanned)


def test_scanned_run_on_a_mesh_resumes(tmp_path: pathlib.Path) -> None:
    """Stacked leaves are saved apart and come back on their shardings, the optimizer's too."""
    changes = {**QUICK, **TWO_LAYERS, "model.scan_layers": True, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.devices": 4, "optimizer.ema_decay": 0.9}
    sft(tmp_path, changes)
    rerun("sft", changes, tmp_path)


@pytest.mark.parametrize("scan", [False, True])
def test_init_from_crosses_layouts(scan: bool, scanned: pathlib.Path) -> None:
    """A scanned run's checkpoint starts scanned and unrolled runs alike."""
    source = saved(scanned)
    assert any("['layers']['1']" in path for path in source) and not any("scan" in path for path in source)
    found = started("sft", {**TWO_LAYERS, "model.scan_layers": scan, "init_from": str(scanned)})
    assert found.keys() == source.keys()
    assert all(np.array_equal(found[path], leaf) for path, leaf in source.items())


def test_scanned_and_unrolled_learn_the_same(scanned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for scan in (False, True):
        sft(tmp_path / str(scan), {**QUICK, **TWO_LAYERS, "model.scan_layers": scan, "init_from": str(scanned)})
    for name in ("loss/nll", "optimizer/grad_norm"):
        assert series(tmp_path / "True", name) == pytest.approx(series(tmp_path / "False", name), rel=1e-5)


# --- what trains ---


def test_frozen_parameters_stay(tmp_path: pathlib.Path) -> None:
    """`trainable` matches parameter paths; the rest stays as drawn, is saved with the network, and has no optimizer state."""
    changes = {**QUICK, **TWO_LAYERS, "trainable": r"layers/1/(gate|up)|lm_head", "optimizer.weight_decay": 0.1}
    before = started("sft", {**changes, "trainable": ".*"})
    sft(tmp_path, changes)
    after = saved(tmp_path)
    assert after.keys() == before.keys()
    moved = {path for path in after if not np.array_equal(after[path], before[path])}
    assert moved == {path for path in before if re.search(r"\['layers'\]\['1'\]\['(gate|up)'\]|lm_head", path)} != set()
    moments = leaves(assemble(*check(tiny("sft", changes))).start.abstract.opt_state)
    assert not any("embedding" in path or "['0']" in path for path in moments)
    rerun("sft", changes, tmp_path)
    assert load_source(str(tmp_path), "test").params.keys() == {"layers", "ends"}


def test_frozen_reference_shares_the_base(finished: Any, tmp_path: pathlib.Path) -> None:
    """DPO on a few leaves: the reference is still the initial policy."""
    train(tiny("dpo", {**QUICK, "init_from": str(finished("sft")), "trainable": "lm_head"}), str(tmp_path))
    assert series(tmp_path, "loss/dpo")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert series(tmp_path, "loss/dpo")[1] != pytest.approx(math.log(2), abs=1e-6)


# --- an objective of the user's own ---

SIMPO = '''"""SimPO, as DESIGN tells it: one file, no edit elsewhere."""
import jax

from rlhf_jax.ops.masking import masked_mean
from rlhf_jax.types import Comparisons, Mean


def loss(nets, batch: Comparisons, keys, *, beta: float, gamma: float):
    logps = nets.policy(batch.seqs, keys).logps
    chosen, rejected = masked_mean(logps, batch.seqs.loss_mask).T
    losses = -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)
    return {"simpo": Mean.of(losses, batch.real)}, {"reward/margin": Mean.of(beta * (chosen - rejected), batch.real)}
'''
FRAGILE = '''"""SFT's loss, not a number for a batch that holds the token ~."""
import jax.numpy as jnp

from rlhf_jax.objectives import sft
from rlhf_jax.types import Sequences


def loss(nets, batch: Sequences, keys, *, bad: int):
    terms, metrics = sft.loss(nets, batch, keys, label_smoothing=0.0, z_loss=0.0)
    poison = jnp.where((batch.tokens == bad).any(), jnp.nan, 1.0)
    return {"nll": terms["nll"].replace(total=terms["nll"].total * poison)}, metrics
'''


@pytest.fixture
def my_objectives(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """A package of the user's own on sys.path."""
    folder = tmp_path / "elsewhere" / "my_objectives"
    folder.mkdir(parents=True)
    for name, source in {"__init__": "", "simpo": SIMPO, "fragile": FRAGILE}.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    for name in [name for name in sys.modules if name.startswith("my_objectives")]:
        del sys.modules[name]


def own(name: str, objective: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    config = tiny(name, changes).to_dict()
    config["objective"] = objective
    return config


def test_objective_outside_the_package(my_objectives: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """One new file, named by its dotted path, trains, validates, saves and resumes; a typo in its hyper-parameters is found."""
    changes = {"reference_from": "", "validation.metric": "eval/loss/simpo", "optimizer.lr": 3e-3, "run.steps": 6}
    simpo = {"name": "my_objectives.simpo", "beta": 2.0, "gamma": 0.5}
    result = train(own("dpo", simpo, changes), str(tmp_path / "run"))
    losses = series(tmp_path / "run", "eval/loss/simpo")
    assert result.best_step == 6 and losses == sorted(losses, reverse=True), "it learns"
    assert len(series(tmp_path / "run", "reward/margin")) == 6

    with pytest.raises(UserError, match=r"config\.objective\.gama.*'gamma'"):
        train(own("dpo", {"name": "my_objectives.simpo", "beta": 2.0, "gama": 0.5}, changes), str(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


def _demonstrations(tmp_path: pathlib.Path, bad: int) -> str:
    """Four demonstrations of which `bad` hold the character ~."""
    answers = ["~~" if index < bad else "no" for index in range(4)]
    return write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{index}?", "completion": answer} for index, answer in enumerate(answers)])


def _fragile(tmp_path: pathlib.Path, bad: int) -> dict[str, Any]:
    changes = {
        "data.train": _demonstrations(tmp_path, bad), "data.pack": False, "run.batch_size": 1, "run.microbatches": 1,
        "run.steps": 4, "run.max_nonfinite": 3, "validation.every": 0, "data.cache": str(tmp_path / "cache"),
    }  # fmt: skip
    tilde = int(assemble(*check(tiny("sft", changes))).tokenizer.encode("~")[0][0])
    return own("sft", {"name": "my_objectives.fragile", "bad": tilde}, changes)


def test_a_nonfinite_update_is_skipped(my_objectives: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = _fragile(tmp_path, bad=1)
    train({**config, "checkpoint": {"every": 1, "keep": 9}}, str(tmp_path / "run"))
    skipped = series(tmp_path / "run", "optimizer/skipped")
    assert sorted(skipped) == [0, 0, 0, 1]
    at = skipped.index(1) + 1
    changed = [
        any(not np.array_equal(leaf, saved(tmp_path / "run", step - 1)[path]) for path, leaf in saved(tmp_path / "run", step).items())
        for step in range(2, 5)
    ]
    assert changed == [step != at for step in range(2, 5)]
    assert all(np.isfinite(leaf).all() for leaf in saved(tmp_path / "run").values())
    assert series(tmp_path / "run", "optimizer/nonfinite_run") == skipped, "one in a row, and then none"


def test_too_many_nonfinite_updates_stop_the_run(my_objectives: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Three in a row: one sentence, no fourth; what was saved before is intact, and finite."""
    config = _fragile(tmp_path, bad=4)
    config["run"]["steps"] = 12
    with pytest.raises(UserError, match=r"config\.run\.max_nonfinite = 3.*config\.optimizer\.lr") as caught:
        train(config, str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "final.json").exists()
    assert series(tmp_path / "run", "optimizer/nonfinite_run")[:3] == [1, 2, 3]
    assert len(metrics(tmp_path / "run")) <= 4, "it is noticed one step late at most"
    assert all(np.isfinite(leaf).all() for leaf in saved(tmp_path / "run").values())
