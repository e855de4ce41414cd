"""Copies between a machine's disk and a bucket, through epath: fetched inputs, and a pipeline's folder kept in both places."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

from etils import epath

from rlhf_jax.errors import UserError

LAST = "checkpoints"  # folders whose files are copied after all others: a log must reach as far as the checkpoint beside it

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
REPORTS = "launch"  # the folder beside a pipeline's own in which machines report: no part of the mirror


def fetch(source: str, target: str | os.PathLike[str]) -> None:
    """Copies a file or a folder here, unless it is here already.

    Args:
      source: in a bucket.
      target: here; stands whole under its name, or not at all.

    Raises:
      UserError: there is no such file.
    """
    there, here = epath.Path(source), pathlib.Path(target)
    if here.exists():
        return
    if not there.exists():
        raise UserError(f"{source}: no such file or folder, or this machine's service account may not read it")
    part = here.with_name(f".{here.name}.part")
    if there.is_dir():
        pull(source, part)
    else:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(there.read_bytes())
    part.replace(here)


def pull(source: str, target: str | os.PathLike[str]) -> None:
    """Copies every file of a folder in a bucket here.

    Args:
      source: in a bucket; nothing happens where it does not exist.
      target: here.
    """
    for name in _names(epath.Path(source), skip=REPORTS):
        here = pathlib.Path(target, name)
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_bytes((epath.Path(source) / name).read_bytes())


class Mirror:
    """A folder here whose content is copied to a bucket as it changes, and from there when a machine is new.

    A kill in the middle of a copy costs at most the newest checkpoint: files of checkpoints are listed first and copied last, so that what was
    logged before they were written is there before them, and a half-copied one is found by its digests.

    Args:
      here: the folder on this machine.
      there: its copy in the bucket.
    """

    def __init__(self, here: str | os.PathLike[str], there: str) -> None:
        self.here, self.there = epath.Path(here), epath.Path(there)
        self._sent: dict[str, tuple[int, int]] = {}  # name → (size, time of change) when it was copied

    def begin(self) -> None:
        """Takes what is in the bucket, where this machine has nothing yet."""
        if self.here.exists():
            return
        part = self.here.with_name(f".{self.here.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        pull(str(self.there), part)
        part.replace(self.here)
        self._sent = {name: self._mark(name) for name in _names(self.here)}

    def push(self) -> None:
        """Copies what changed since the last time, and deletes in the bucket what is gone here."""
        names = [name for name in _names(self.here) if not (name.endswith(".part") or UNFINISHED in name)]
        for name in sorted(names, key=lambda name: LAST in name.split("/")):
            try:
                mark = self._mark(name)
                if self._sent.get(name) != mark:
                    target = self.there / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes((self.here / name).read_bytes())
                    self._sent[name] = mark
            except FileNotFoundError:  # a checkpoint that was replaced meanwhile
                continue
        for name in sorted(self._sent.keys() - set(names)):
            (self.there / name).unlink(missing_ok=True)
            del self._sent[name]

    def _mark(self, name: str) -> tuple[int, int]:
        stat = os.stat(self.here / name)
        return stat.st_size, stat.st_mtime_ns


def _names(folder: epath.Path, skip: str = "") -> Iterator[str]:
    """Paths of the files below a folder, relative to it, in order, without those of one subfolder."""
    if not folder.exists():
        return
    for entry in sorted(folder.iterdir(), key=str):
        if not entry.is_dir():
            yield entry.name
        elif entry.name != skip:
            yield from (f"{entry.name}/{name}" for name in _names(entry))
