"""A reference's log-probs, worked out once and read by every later run on the same rows.

A folder holds one array per prepared set, `<digest>.npy`: the tokens of its rows behind each other, branch by branch. A set's digest covers the
contents of the files, the tokenizer, the template and the length options, so that log-probs of other rows are never read. Batches carry them as
`ref_logps`, and no reference network is needed. Kinds whose batches make rows of their own (KTO's mismatched pairs) cannot have them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data.prepare import Prepared
from rlhf_jax.errors import UserError

ABOUT = "reference.json"  # whose log-probs these are
UNSERVED = ("prompt", "feedback")


def is_references(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder of cached log-probs."""
    return (Path(path) / ABOUT).is_file()


def check_kind(kind: str, key: str) -> None:
    """Refuses kinds of record that cannot have cached log-probs.

    Args:
      kind: one of `records.KINDS`.
      key: the flag or config key that asks for them, for messages.

    Raises:
      UserError: the kind is such a one.
    """
    if kind in UNSERVED:
        raise UserError(f"{key}: log-probs are not cached for rows of kind {kind!r}, whose batches hold rows of their own; name a network instead")


def attach(prepared: Prepared, folder: str, key: str, what: str) -> None:
    """Has a set's rows come with their cached log-probs.

    Args:
      prepared: the set.
      folder: of the cache.
      key: the config key that named it, for messages.
      what: the config key of the set's files.

    Raises:
      UserError: the cache holds none for exactly these rows.
    """
    check_kind(prepared.kind, f"{key} = {folder!r}")
    path = Path(folder) / f"{prepared.digest}.npy"
    lengths = prepared.lengths.sum(axis=1, dtype=np.int64)
    if not path.is_file():
        raise UserError(f"{key} = {folder!r} holds no log-probs for the rows of {what} as this config reads them (file, tokenizer, template and "
                        "length options): write it again with rlhf-jax score --config and these settings")
    values = np.load(path, mmap_mode="r")
    if values.shape != (lengths.sum(),) or values.dtype != np.float32:
        raise UserError(f"{path} holds {values.shape} of {values.dtype} and not {lengths.sum()} log-probs: write it again")
    ends = np.cumsum(lengths)
    prepared.refer(lambda index: np.array(values[ends[index] - lengths[index] : ends[index]]))


def write(folder: Path, prepared: Prepared, logps: Iterable[np.ndarray]) -> int:
    """Writes one set's log-probs.

    Args:
      folder: of the cache.
      prepared: the set.
      logps: for each row in order, those of its branches behind each other, [sum of lengths] float32.

    Returns:
      How many tokens they are of.
    """
    total = int(prepared.lengths.sum())
    values = np.lib.format.open_memmap(folder / f"{prepared.digest}.npy", mode="w+", dtype=np.float32, shape=(total,))
    at = 0
    for row in logps:
        values[at : at + len(row)] = row
        at += len(row)
    if at != total:
        raise ValueError(f"{at} log-probs for {total} tokens")
    values.flush()
    return total


def finish(folder: Path, about: Mapping[str, Any]) -> None:
    """Marks a folder as a cache: the last thing that is written.

    Args:
      folder: of the cache.
      about: JSON of whose log-probs these are.
    """
    (folder / ABOUT).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
