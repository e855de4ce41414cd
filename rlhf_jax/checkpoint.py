"""Checkpoints: all of Orbax, and what Orbax does not check.

A step holds named items (`params` apart from `rest`, so that parameters load alone) and a JSON manifest: the caller's meta, and for
every leaf its dtype, shape and SHA-256. Items are stored as nested dicts with escaped string keys, so that namedtuples, `None`, empty
containers, zero-size arrays and typed PRNG keys come back exactly as the abstract tree says, and a plain Orbax reader can open them too.
Restoring compares the manifest with the abstract tree (a misfit is the user's: one UserError), restores onto the new shardings, and
verifies the digests (damage is the disk's: the step moves to `quarantine/`, a warning says so, and the step before is tried).

Deviations from plain Orbax: a flipped bit does not restore silently, a dtype is never cast, an empty `N/` is not the latest step, a full
disk is noticed before the save, and keys such as `a.b` beside `a/b` do not overwrite each other. Digests are computed before `save`
returns (the buffers may be donated next): about 1.7 GB/s per core, in parallel over leaves; only writing is asynchronous.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from rlhf_jax import manifest as mf
from rlhf_jax.errors import UserError
from rlhf_jax.manifest import state_hash, tree_digest
from rlhf_jax.types import PyTree

__all__ = ["BEST", "CHECKPOINTS", "QUARANTINE", "Checkpointer", "load_params", "state_hash", "tree_digest"]

CHECKPOINTS = "checkpoints"  # folders of a run's workdir
BEST = "best"
QUARANTINE = "quarantine"  # a folder beside the steps; nothing in it is ever read again
PARAMS = "params"  # the item that `load_params` reads …
EMA = "ema"  # … unless the run kept a moving average of them, which is what validation judged
_MANIFEST = "meta"
_TMP = ".orbax-checkpoint-tmp"
_DECIDES = {PARAMS: "config.model, config.critic and config.objective", "rest": "config.optimizer and config.objective"}


class _DamagedError(Exception):
    """A step on disk is incomplete or differs from what was saved; str() says how."""


class Checkpointer:
    """The checkpoints of one run, newest `keep` of them; writes in the background. Use it as a context manager.

    The best checkpoint lives in a folder of its own: `Checkpointer(workdir / "best", every=0, keep=1)` with `save(…, force=True)`.
    """

    def __init__(self, directory: epath.PathLike, *, every: int, keep: int):
        """Opens (and creates) `directory`.

        Args:
          directory: local or gs:// folder that holds one folder per step.
          every: save at multiples of this many steps; 0 saves only when forced or preempted.
          keep: how many steps to keep, ≥ 1.

        Raises:
          UserError: on a negative `every` or `keep` below 1.
        """
        if every < 0 or keep < 1:
            raise UserError(f"config.checkpoint: every = {every} must be ≥ 0 and keep = {keep} ≥ 1; write e.g. every=100, keep=2")
        self.directory = _absolute(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        # A policy of one's own replaces the default, which contains the preemption policy: it is put back here.
        decide: list[Any] = [policies.PreemptionCheckpointingPolicy()]
        if every:
            decide.append(policies.FixedIntervalPolicy(every))
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=policies.AnySavePolicy(decide),
                preservation_policy=policies.LatestN(keep),
                save_root_metadata=False,
            ),
        )
        self._writing: int | None = None
        self._closed = False
        _before_shutdown(self.close)

    def save(self, step: int, items: Mapping[str, PyTree], meta: Mapping[str, Any], *, force: bool = False) -> bool:
        """Starts saving `step` if it is due or forced; the arrays may be donated as soon as this returns.

        Args:
          step: number of optimizer updates made.
          items: trees of arrays by name.
          meta: JSON-serializable; comes back from `restore_latest` and `load_params`.
          force: save although not due. A step that exists already is never written again.

        Returns:
          Whether a save was started.

        Raises:
          UserError: too little free space, or the previous save failed.
        """
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()  # does not block; raises what the last save met
        if not force and not self._manager.should_save(step):
            return False
        self.wait()
        if step in self.steps():
            return False
        if step in self._manager.all_steps():  # an empty `N/`, which Orbax takes for a checkpoint
            self._quarantine(step, "it holds no manifest")
        flat = {name: mf.flatten(tree) for name, tree in items.items()}
        _check_space(self.directory, step, (leaf for leaves, _ in flat.values() for leaf in leaves.values()))
        manifest = mf.build(step, flat, meta)
        saves: dict[str, Any] = {_MANIFEST: ocp.args.JsonSave(manifest)}
        for name, (leaves, _) in flat.items():
            stored = {path: mf.words(leaf) for path, leaf in leaves.items() if leaf.size}  # Orbax refuses zero-size arrays
            if stored:
                saves[name] = ocp.args.StandardSave(mf.nest(stored))
        self._writing = step
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**saves), force=True))
        return True

    def restore_latest(self, abstract_items: Mapping[str, PyTree]) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        """The newest intact step, on the shardings of the abstract tree; damaged steps are quarantined on the way.

        Args:
          abstract_items: by item name, trees of `ShapeDtypeStruct` with shardings (None: the first local device) or of arrays to
            imitate (NumPy stays NumPy). Items that were saved and are not asked for are not read.

        Returns:
          (step, items, meta), or None when there is no intact checkpoint.

        Raises:
          UserError: the checkpoint is intact and of another model, optimizer or dtype; every difference is listed.
        """
        self.wait()
        self._sweep()
        for step in reversed(_step_numbers(self.directory)):
            try:
                items, meta = _read(self.directory / str(step), abstract_items, subject="checkpoint")
            except _DamagedError as damage:
                self._quarantine(step, str(damage))
                continue
            return step, items, meta
        return None

    def steps(self) -> list[int]:
        """Steps that are complete or being written, ascending; an empty or torn `N/` is not among them."""
        return sorted(s for s in self._manager.all_steps() if s == self._writing or _has_manifest(self.directory / str(s)))

    def reached_preemption(self, step: int) -> bool:
        """Whether the machine is being taken away; all processes agree on the step. Needs `jax.distributed.initialize`."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Blocks until the save in progress is on disk.

        Raises:
          UserError: it failed for want of space or permission.
        """
        self._guard(self._manager.wait_until_finished)
        self._writing = None

    def close(self) -> None:
        """Waits, then releases Orbax's threads. Called at interpreter exit if the caller forgot."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _guard(self, call: Callable[[], object]) -> None:
        """Runs `call`; turns a full disk or a forbidden folder into the user's sentence."""
        try:
            call()
        except Exception as error:
            step, self._writing = self._writing, None
            if isinstance(error, OSError) or re.search(r"No space left|RESOURCE_EXHAUSTED|PERMISSION_DENIED|Permission denied", str(error)):
                raise UserError(
                    f"checkpoint: step {step} was not written under {self.directory} ({_first_line(error)}); "
                    "free some space, lower config.checkpoint.keep or choose another --workdir"
                ) from error
            raise

    def _sweep(self) -> None:
        """Quarantines what killed saves left behind."""
        if jax.process_index() == 0 and self.directory.exists():  # in a bucket an empty folder does not
            for name in sorted(path.name for path in self.directory.iterdir()):
                if _TMP in name:
                    _set_aside(self.directory, name, "its save was interrupted")
                elif name.isdigit() and not _has_manifest(self.directory / name):
                    _set_aside(self.directory, name, "it holds no manifest")
        self._reload("sweep")

    def _quarantine(self, step: int, reason: str) -> None:
        if jax.process_index() == 0:
            _set_aside(self.directory, str(step), reason)
        self._reload(f"quarantine {step}")

    def _reload(self, event: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {event}")
        self._manager.reload()


def _set_aside(directory: epath.Path, name: str, reason: str) -> None:
    target = directory / QUARANTINE / name
    if _TMP in name and target.exists():
        target.rmtree()  # never restorable: one is evidence enough, a hundred would fill the disk
    number = 1
    while target.exists():
        target, number = directory / QUARANTINE / f"{name}.{number}", number + 1
    target.parent.mkdir(exist_ok=True)
    if _is_remote(directory):
        (target.parent / ".folder").write_text("")  # a rename needs the folder, and in a bucket an empty one does not exist
    (directory / name).rename(target)
    logging.warning("checkpoint %s is not used: %s; moved to %s", directory / name, reason, target)


def load_params(
    path: epath.PathLike, *, key: str, which: Literal["latest", "best"] | int = "latest", abstract: PyTree = None
) -> tuple[PyTree, dict[str, Any]]:
    """The parameters of a checkpoint, and its meta; nothing on disk is changed.

    Args:
      path: a run's workdir (holding `checkpoints/`, perhaps `best/`), a folder of steps, or a single step.
      key: the config key that named the path, e.g. "config.init_from", for messages.
      which: "latest", "best" or a step number; a path to a single step decides by itself.
      abstract: tree of `ShapeDtypeStruct` with shardings to restore straight onto; None gives nested dicts of NumPy arrays.

    Returns:
      (params, meta); meta's "checkpoint" is the step's own path, "fingerprint" a digest of all that it holds.

    Raises:
      UserError: nothing there, damaged, or not fitting `abstract`.
    """
    step, subject = _resolve(path, key, which), f"{key} = {str(path)!r}: the checkpoint"
    try:
        manifest = _read_manifest(step)
        if PARAMS not in manifest["items"]:
            raise UserError(f"{subject} {step} holds no item {PARAMS!r}, only {sorted(manifest['items'])}; name a training run's")
        item = EMA if EMA in manifest["items"] else PARAMS
        found = {"checkpoint": str(step), "fingerprint": mf.text_digest(manifest)}
        if abstract is not None:
            items, meta = _read(step, {item: abstract}, subject=subject)
            return items[item], meta | found
        record = manifest["items"][item]
        return mf.nest(_read_host(step / item, record) | _empties(record), mf.unescape), manifest["meta"] | found
    except _DamagedError as damage:
        raise UserError(f"{subject} {step} is damaged: {damage}; name another step of that run or train it again") from damage


def is_run(path: epath.PathLike) -> bool:
    """Whether `path` is a run's workdir, a folder of its steps or a step."""
    root = epath.Path(path)
    return any(map(_has_manifest, (root, *(child for child in root.iterdir() if child.name.isdigit())))) or (root / CHECKPOINTS).is_dir()


def _has_manifest(step: epath.Path) -> bool:
    return (step / _MANIFEST / "metadata").exists()


def _read_manifest(step: epath.Path) -> dict[str, Any]:
    try:
        return mf.check(json.loads((step / _MANIFEST / "metadata").read_text()))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise _DamagedError(f"its manifest is unreadable ({_first_line(error)})") from error


# --- reading ---


def _read(step: epath.Path, abstract_items: Mapping[str, PyTree], *, subject: str) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Items on the abstract trees' shardings, verified. Raises _DamagedError or UserError."""
    manifest = _read_manifest(step)
    targets = {name: mf.flatten(tree)[0] for name, tree in abstract_items.items()}
    _refuse_misfits(manifest, targets, f"{subject} {step}")
    items = {}
    for name, leaves in targets.items():
        record = manifest["items"][name]
        try:
            restored = _restore(step / name, record, {path: _target(leaf) for path, leaf in leaves.items()})
        except Exception as error:
            _read_host(step / name, record)  # raises _DamagedError if the disk is to blame; otherwise memory, shardings … are
            raise error
        _verify(record, restored, name)
        treedef = jax.tree_util.tree_structure(abstract_items[name])
        items[name] = jax.tree_util.tree_unflatten(treedef, list(restored.values()))
    return items, manifest["meta"]


def _refuse_misfits(manifest: Mapping[str, Any], targets: Mapping[str, Mapping[str, Any]], subject: str) -> None:
    """Before anything is read: Orbax would cast a dtype silently and stop at the first other difference."""
    problems: list[str] = []
    blamed: list[str] = []
    for name, leaves in targets.items():
        if name in manifest["items"]:
            found = mf.differences(manifest["items"][name]["leaves"], leaves, name)
        else:
            found = [f"it holds no item {name!r}"]
        problems += found
        if found:
            blamed.append(_DECIDES.get(name, f"the config of {name!r}"))
    if problems:
        remedy = "restore the settings that it was saved with, or use another --workdir or checkpoint"
        raise UserError(f"{subject} does not fit: {'; '.join(problems)}; decided by {' and '.join(blamed)}: {remedy}")


def _target(leaf: Any) -> Any:
    """What Orbax restores onto: an abstract array with a sharding, or an empty NumPy array."""
    if isinstance(leaf, np.ndarray):
        return np.empty(leaf.shape, leaf.dtype)
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if mf.is_key(leaf):  # the words' axis stands last and is replicated, so the keys' sharding serves
        shape = jax.eval_shape(jax.random.key_data, shape)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _restore(item: epath.Path, record: Mapping[str, Any], targets: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path, in the order of `targets`."""
    stored = {path: target for path, target in targets.items() if target.size}
    flat: dict[str, Any] = {}
    if stored:
        me = jax.process_index()  # every host reads for itself and waits for none: what one cannot read, all hear of (distributed.meeting)
        alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={me}, barrier_sync_key_prefix=f"host {me}")
        with ocp.Checkpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=alone) as reader:
            flat = mf.unnest(reader.restore(item, args=ocp.args.StandardRestore(mf.nest(stored))))
    for path, target in targets.items():
        if not target.size:
            zeros = np.zeros(target.shape, target.dtype)
            flat[path] = zeros if isinstance(target, np.ndarray) else jax.device_put(zeros, target.sharding)
        if "impl" in record["leaves"][path]:
            flat[path] = jax.random.wrap_key_data(flat[path], impl=record["leaves"][path]["impl"])
    return {path: flat[path] for path in targets}


def _read_host(item: epath.Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path, NumPy but for typed keys, verified."""
    targets = {path: _host_target(leaf) for path, leaf in record["leaves"].items()}
    try:
        restored = _restore(item, record, targets)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        raise _DamagedError(f"{item.name} is unreadable ({_first_line(error)})") from error
    _verify(record, restored, item.name)
    return restored


def _host_target(leaf: Mapping[str, Any]) -> np.ndarray:
    if "impl" in leaf:
        words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=leaf["impl"])))
        return np.empty((*leaf["shape"], *words.shape), words.dtype)
    return np.empty(leaf["shape"], jax.numpy.dtype(leaf["dtype"]))


def _verify(record: Mapping[str, Any], restored: Mapping[str, Any], name: str) -> None:
    checked = {path: leaf for path, leaf in restored.items() if record["leaves"][path]["sha256"] is not None}
    digests = mf.digests(checked)
    bad = [f"{name}/{path}" for path, digest in digests.items() if digest not in (None, record["leaves"][path]["sha256"])]
    anywhere = bool(bad)
    if jax.process_count() > 1:  # all processes must walk back together
        anywhere = bool(np.any(multihost_utils.process_allgather(np.array(anywhere))))
    if anywhere:
        raise _DamagedError(f"{', '.join(bad) or 'a leaf on another host'} differs from what was saved")


def _empties(record: Mapping[str, Any]) -> dict[str, Any]:
    return {path: {} if kind == "dict" else None for path, kind in record["empty"].items()}


# --- paths, space, shutdown ---


def _resolve(path: epath.PathLike, key: str, which: str | int) -> epath.Path:
    """The step folder that `path` and `which` name."""
    root = _absolute(path)
    if root.name.isdigit() and _has_manifest(root):
        return root
    if which == "best":
        folders = [root / BEST] if root.name != CHECKPOINTS else [root.parent / BEST]
    else:
        folders = [root / CHECKPOINTS, root] + ([root / BEST] if isinstance(which, int) else [])
    for folder in folders:
        steps = [s for s in _step_numbers(folder) if _has_manifest(folder / str(s))] if folder.is_dir() else []
        if isinstance(which, int):
            steps = [s for s in steps if s == which]
        if steps:
            return folder / str(steps[-1])
    looked = " and ".join(f"{folder}/{which if isinstance(which, int) else '<step>'}" for folder in folders)
    state = "holds no such checkpoint" if root.exists() else "does not exist"
    raise UserError(f"{key} = {str(path)!r} {state} (looked for {looked}); name a run's --workdir, its checkpoints folder or one step")


def _step_numbers(folder: epath.Path) -> list[int]:
    return sorted(int(path.name) for path in (folder.iterdir() if folder.exists() else ()) if path.name.isdigit())


def _absolute(path: epath.PathLike) -> epath.Path:
    return path if _is_remote(path := epath.Path(path)) else path.expanduser().resolve()  # Orbax refuses relative paths


def _is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def _check_space(directory: epath.Path, step: int, leaves: Iterable[Any]) -> None:
    """Orbax meets a full disk in the background, after `save` returned True."""
    if _is_remote(directory):
        return
    needed = sum(mf.words(leaf).nbytes for leaf in leaves)
    if (free := shutil.disk_usage(directory).free) < needed:
        raise UserError(
            f"checkpoint: step {step} needs {needed / 2**20:.1f} MiB and {directory} has {free / 2**20:.1f} MiB free; "
            "free some space, lower config.checkpoint.keep or choose another --workdir"
        )


def _before_shutdown(call: Callable[[], None]) -> None:
    """Runs `call` at exit, before the thread pools that an unfinished save still needs are shut down."""
    method = weakref.WeakMethod(call)

    def run() -> None:
        if (alive := method()) is not None:
            alive()

    getattr(threading, "_register_atexit", atexit.register)(run)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
