"""Checkpoints: everything comes back bit for bit, on other shardings too; damage is never restored and misfits are never cast."""

import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import checkpoint
from rlhf_jax.checkpoint import Checkpointer, load_params, state_hash, tree_digest
from rlhf_jax.errors import UserError
from tests.checkpoints import abstract, data_files, flip_a_bit, mesh, params, restored, saved

Pair = collections.namedtuple("Pair", "left right")


# --- round trips ---


def odd_state():
    """Everything a TrainState may hold that a serializer likes to lose."""
    tree = {"w": jnp.linspace(0, 1, 16).reshape(8, 2), "frozen": jnp.ones(8)}
    masked = optax.chain(optax.masked(optax.adamw(1e-3), {"w": True, "frozen": False}), optax.scale_by_schedule(lambda s: 1.0))
    return {
        "opt_state": masked.init(tree),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8, impl="rbg"), 8),
        "carry": {"none": None, "empty": {}, "pair": Pair(jnp.int32(3), (jnp.zeros((0, 4)), [jnp.array(True)]))},
        "a.b": jnp.float32(1),
        "a": {"b": jnp.float32(2), "c/d": jnp.float32(3), "~": jnp.float32(4)},
        "seven": {7: jnp.int4(3)},
    }


def test_every_kind_of_leaf_and_container_round_trips(tmp_path):
    state = odd_state()
    with Checkpointer(tmp_path, every=1, keep=1) as saver:
        saver.save(1, {"rest": state, "nothing": {}}, {"name": "odd", "nested": {"x": [1, 2.5, None]}})
    with Checkpointer(tmp_path, every=1, keep=1) as saver:
        step, items, meta = saver.restore_latest({"rest": abstract(state), "nothing": {}})
    assert step == 1 and meta == {"name": "odd", "nested": {"x": [1, 2.5, None]}} and items["nothing"] == {}
    back = items["rest"]
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert state_hash(back) == state_hash(state)
    assert back["keys"].dtype == state["keys"].dtype and str(jax.random.key_impl(back["keys"])) == "rbg"
    assert float(back["a.b"]) == 1 and float(back["a"]["b"]) == 2
    assert jnp.array_equal(jax.random.normal(back["key"], 3), jax.random.normal(state["key"], 3))


@pytest.mark.parametrize("devices", [4, 1])
def test_restores_onto_other_meshes(tmp_path, devices):
    old, new = (NamedSharding(mesh(n), PartitionSpec("data")) for n in (8, devices))
    state = {"w": jnp.arange(64.0).reshape(16, 4), "keys": jax.random.split(jax.random.key(0), 8), "step": jnp.int32(5)}
    placed = jax.device_put(state, jax.tree.map(lambda x: old if x.ndim else NamedSharding(old.mesh, PartitionSpec()), state))
    with Checkpointer(tmp_path, every=1, keep=1) as saver:
        saver.save(5, {"params": placed}, {})
        _, items, _ = saver.restore_latest({"params": abstract(state, new)})
    back = items["params"]
    assert state_hash(back) == state_hash(state) == state_hash(placed)
    assert back["w"].sharding.is_equivalent_to(new, 2) and back["keys"].sharding.is_equivalent_to(new, 1)


def test_donating_right_after_save_is_safe(tmp_path):
    x = jnp.arange(1_000_000.0)
    step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpointer(tmp_path, every=1, keep=1) as saver:
        saver.save(1, {"params": {"x": x}}, {})
        address = x.unsafe_buffer_pointer()
        digested = jnp.arange(1_000_000.0)
        tree_digest({"x": digested})
        address, moved = digested.unsafe_buffer_pointer(), step(digested)
        assert moved.unsafe_buffer_pointer() == address, "a digest must not pin the buffer"
        step(x)
    loaded, _ = load_params(tmp_path, key="config.init_from")
    np.testing.assert_array_equal(loaded["x"], np.arange(1_000_000, dtype=np.float32))


def test_saving_under_a_transfer_guard(tmp_path):
    key = jax.random.key(0)
    sharded = jax.device_put(params(), NamedSharding(mesh(8), PartitionSpec("data")))
    with Checkpointer(tmp_path, every=1, keep=1) as saver, jax.transfer_guard("disallow"):
        assert saver.save(1, {"params": sharded, "rest": {"key": key}}, {})


# --- policy ---


def test_interval_force_and_keep(tmp_path):
    with Checkpointer(tmp_path, every=2, keep=2) as saver:
        started = [saver.save(s, {"params": params(s)}, {}) for s in range(1, 7)]
        assert started == [False, True, False, True, False, True]
        assert saver.save(7, {"params": params(7)}, {}, force=True)
        assert not saver.save(7, {"params": params(8)}, {}, force=True), "a step is never written twice"
        saver.wait()
        assert saver.steps() == [6, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["6", "7"]


def test_every_zero_saves_only_when_forced(tmp_path):
    with Checkpointer(tmp_path, every=0, keep=1) as saver:
        assert not any(saver.save(s, {"params": params()}, {}) for s in (0, 1, 100))
        assert saver.steps() == [] and saver.restore_latest({"params": abstract(params())}) is None
        assert saver.save(3, {"params": params()}, {}, force=True)


def test_preemption_still_saves(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, every=0, keep=1) as saver:
        monkeypatch.setattr(ocp.utils, "reached_preemption", lambda step: step == 2)
        assert not saver.reached_preemption(1) and not saver.save(1, {"params": params()}, {})
        assert saver.reached_preemption(2) and saver.save(2, {"params": params()}, {})


def test_best_folder_keeps_the_last_saved_even_after_a_resume(tmp_path):
    """A resumed run replays its bests: an earlier step saved now replaces a later one saved before the kill."""
    saved(tmp_path / "best", steps=[30], keep=1)
    with Checkpointer(tmp_path / "best", every=0, keep=1) as best:
        best.save(20, {"params": params(20)}, {}, force=True)
        best.wait()
        assert best.steps() == [20]


@pytest.mark.parametrize("options", [{"every": -1, "keep": 1}, {"every": 1, "keep": 0}])
def test_bad_options(tmp_path, options):
    with pytest.raises(UserError, match=r"config\.checkpoint"):
        Checkpointer(tmp_path, **options)


# --- damage ---


def truncate(step):
    for path in data_files(step):
        os.truncate(path, path.stat().st_size // 2)


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def lose_an_item(step):
    shutil.rmtree(step / "params")


def tear_the_manifest(step):
    path = step / "meta" / "metadata"
    path.write_text(path.read_text()[:-20])


def change_the_manifest(step):
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"seed": 2', '"seed": 3'))


def test_orbax_alone_restores_a_flipped_bit_and_we_do_not(tmp_path, caplog):
    saved(tmp_path, steps=[1, 2])
    flip_a_bit(tmp_path / "2")
    with ocp.CheckpointManager(tmp_path) as manager:
        silent = manager.restore(2, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract(params()))))
    assert state_hash(silent["params"]) != state_hash(params(2)), "if Orbax notices one day, the digests may go"
    step, items, _ = restored(tmp_path)
    assert step == 1 and state_hash(items["params"]) == state_hash(params(1))
    assert "params/policy/w differs" in caplog.text and caplog.text.count("is not used") == 1
    assert (tmp_path / "quarantine" / "2").is_dir() and not (tmp_path / "2").exists()


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, lose_an_item, tear_the_manifest, change_the_manifest])
def test_walks_back_from_damage_and_says_so(tmp_path, caplog, damage):
    saved(tmp_path, steps=[1, 2])
    damage(tmp_path / "2")
    step, items, meta = restored(tmp_path)
    assert (step, meta) == (1, {"seed": 1}) and state_hash(items["params"]) == state_hash(params(1))
    assert caplog.text.count("is not used") == 1 and str(tmp_path / "quarantine" / "2") in caplog.text
    caplog.clear()
    with Checkpointer(tmp_path, every=1, keep=5) as saver:
        assert saver.steps() == [1]
        assert saver.save(2, {"params": params(2)}, {}), "the step can be written again"
    assert restored(tmp_path)[0] == 2 and not caplog.text


def test_nothing_left_is_none_and_loud(tmp_path, caplog):
    saved(tmp_path, steps=[1, 2])
    for step in (1, 2):
        flip_a_bit(tmp_path / str(step))
    assert restored(tmp_path) is None and caplog.text.count("is not used") == 2


def test_interrupted_saves_are_set_aside(tmp_path, caplog):
    saved(tmp_path)
    for _ in range(2):  # only one of a kind is kept
        (tmp_path / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
        assert restored(tmp_path)[0] == 1
    assert "interrupted" in caplog.text
    assert [p.name for p in (tmp_path / "quarantine").iterdir()] == ["2.orbax-checkpoint-tmp"]


def test_an_empty_step_is_neither_latest_nor_in_the_way(tmp_path):
    saved(tmp_path)
    for _ in range(2):
        (tmp_path / "2").mkdir()
        with Checkpointer(tmp_path, every=1, keep=5) as saver:
            assert saver.steps() == [1]
            assert saver.save(2, {"params": params(2)}, {}, force=True)
        assert restored(tmp_path)[0] == 2
        shutil.rmtree(tmp_path / "2")
    assert sorted(p.name for p in (tmp_path / "quarantine").iterdir()) == ["2", "2.1"]


def test_a_failure_that_is_not_the_disks_quarantines_nothing(tmp_path):
    saved(tmp_path)
    wrong = NamedSharding(mesh(3), PartitionSpec("data"))  # 64 rows on 3 devices
    with Checkpointer(tmp_path, every=1, keep=1) as saver:
        with pytest.raises(ValueError, match=r"divisible|evenly") as caught:
            saver.restore_latest({"params": abstract(params(), wrong)})
        assert not isinstance(caught.value, UserError) and saver.steps() == [1]
    assert not (tmp_path / "quarantine").exists()


# --- misfits ---


def test_every_misfit_is_listed_and_nothing_is_quarantined(tmp_path):
    saved(tmp_path)
    other = {"policy": {"w": jnp.zeros((64, 4)), "b": jnp.zeros(8), "extra": jnp.zeros(3)}}
    with Checkpointer(tmp_path, every=1, keep=1) as saver:
        with pytest.raises(UserError) as caught:
            saver.restore_latest({"params": abstract(other), "rest": {}, "ema": abstract(other)})
        assert saver.steps() == [1]
    message = str(caught.value)
    for phrase in (
        "params/policy/w has shape (64, 64) in the checkpoint and (64, 4) here",
        "params/policy/b is bfloat16 in the checkpoint and float32 here",
        "params/policy/extra is missing from the checkpoint",
        "rest/step is only in the checkpoint",
        "no item 'ema'",
        "config.model",
        "config.optimizer",
        str(tmp_path),
    ):
        assert phrase in message
    assert "\n" not in message


def test_key_implementations_are_not_mixed(tmp_path):
    with Checkpointer(tmp_path, every=1, keep=1) as saver:
        saver.save(1, {"rest": {"key": jax.random.key(0)}}, {})
        with pytest.raises(UserError, match=r"key<fry> in the checkpoint and key<rbg>"):
            saver.restore_latest({"rest": {"key": jax.random.key(0, impl="rbg")}})


# --- space and asynchronous errors ---


def test_a_full_disk_is_noticed_before_the_save(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with Checkpointer(tmp_path, every=1, keep=1) as saver:
        with pytest.raises(UserError, match=r"needs .* MiB and .* has .* MiB free.*workdir"):
            saver.save(1, {"params": params()}, {})
        assert saver.steps() == []


@pytest.mark.parametrize("surface", ["save", "wait", "close"])
def test_a_failed_background_write_surfaces(tmp_path, monkeypatch, surface):
    handler = ocp.JsonCheckpointHandler

    async def fail(self, *args):
        raise OSError(28, "No space left on device")

    saver = Checkpointer(tmp_path, every=1, keep=2)
    saver.save(1, {"params": params(1)}, {})
    saver.wait()
    monkeypatch.setattr(handler, "_save_fn", fail)
    assert saver.save(2, {"params": params(2)}, {}), "Orbax says yes, and fails later"
    calls = {"save": lambda: saver.save(3, {"params": params(3)}, {}), "wait": saver.wait, "close": saver.close}
    with pytest.raises(UserError, match=r"step 2 was not written .*No space left.*workdir"):
        calls[surface]()
    monkeypatch.undo()
    if surface != "close":
        assert saver.save(4, {"params": params(4)}, {}), "after making room, saving goes on"
        saver.close()
    assert restored(tmp_path)[0] == (1 if surface == "close" else 4)


# --- killed ---

_SAVES = textwrap.dedent("""
    import sys, jax.numpy as jnp
    from rlhf_jax.checkpoint import Checkpointer
    directory, mode = sys.argv[1:]
    saver = Checkpointer(directory, every=1, keep=3)
    for step in range(1, 2 if mode == "forgets to close" else 10_000):
        saver.save(step, {"params": {f"layer{i}": jnp.full((300, 300), step * 100.0 + i) for i in range(8)}}, {"step": step})
        print(step, flush=True)
""")


def spawn(directory, mode):
    return subprocess.Popen([sys.executable, "-c", _SAVES, str(directory), mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_layers(directory):
    with Checkpointer(directory, every=1, keep=3) as saver:
        target = {f"layer{i}": jax.ShapeDtypeStruct((300, 300), jnp.float32) for i in range(8)}
        step, items, meta = saver.restore_latest({"params": target})
    assert meta == {"step": step}
    for i in range(8):
        np.testing.assert_array_equal(items["params"][f"layer{i}"], np.full((300, 300), step * 100.0 + i))
    return step


@pytest.mark.parametrize("attempt", range(2))
def test_sigkill_in_a_save_leaves_an_intact_step(tmp_path, attempt):
    with spawn(tmp_path, "until killed") as process:
        started = 0
        while started < 2:  # when the second save has started, the first is on disk
            started = int(process.stdout.readline())
        time.sleep(random.Random(attempt).uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        started = max([started, *(int(line) for line in process.stdout.read().split())])
    assert process.returncode == -signal.SIGKILL
    assert started - 2 <= check_layers(tmp_path) <= started + 1


def test_a_forgotten_close_still_waits_at_exit(tmp_path):
    with spawn(tmp_path, "forgets to close") as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert check_layers(tmp_path) == 1


def test_the_manifest_is_plain_json(tmp_path):
    saved(tmp_path)
    manifest = json.loads((tmp_path / "1" / "meta" / "metadata").read_text())
    record = manifest["items"]["params"]["leaves"]["policy/w"]
    assert record == {"dtype": "float32", "shape": [64, 64], "sha256": tree_digest(params(1))["policy/w"]}
