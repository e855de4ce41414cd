"""Data files to a prepared set: TFDS writes array_record once, everything after indexes it (law 7).

`prepare` hashes the files' contents, the tokenizer, the template and the options; the folder of that digest either stands complete or
does not exist, since it is built under another name and renamed. Beside the rows stand `lengths.npy` and `head_lengths.npy`, with
which packing and padding are planned without reading a row, and `stats.json`. TensorFlow is never imported; TFDS itself, slow to
import, only here and late.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.encode import Encoder, Row
from rlhf_jax.data.readers import Paths, data_files, read_records
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

VERSION = 2  # raise it when the same input gives other rows
SPLIT = "train"
_IN_MEMORY = 1 << 23  # tokens; a smaller set is decoded once and kept
PAIR = ("chosen", "rejected")


def prepare(
    kind: str,
    path: Paths,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    max_length: int,
    prompt_length: int | None,
    overlong: str,
    cache: str | os.PathLike[str],
) -> Prepared:
    """The prepared set of these files under these options, built unless it stands in `cache`.

    Args:
      kind: one of `records.KINDS`.
      path: see `readers.data_files`.
      tokenizer, template, max_length, prompt_length, overlong: see `encode.Encoder`.
      cache: the folder of prepared sets.

    Raises:
      UserError: a malformed row, an option out of range, or no row kept.
    """
    files = data_files(path)
    encoder = Encoder(tokenizer, template, max_length=max_length, prompt_length=prompt_length, overlong=overlong)
    options = {"prompt_length": prompt_length} if kind == "prompt" else {"max_length": max_length, "overlong": overlong}
    identity = {
        "version": VERSION,
        "kind": kind,
        "files": [[os.path.basename(file), _sha256(file)] for file in files],
        "tokenizer": tokenizer.digest,
        "template": template.digest if template else None,
        "options": options if kind != "text" else {"max_length": max_length},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = os.path.join(os.fspath(cache), f"{kind}-{digest}")
    if not os.path.isdir(folder):
        _build(folder, kind, files, encoder, identity)
    return Prepared(folder, kind)


class Prepared:
    """A complete set on disk, read by row number (the order of the files).

    Attributes:
      lengths: [N, K] int32, tokens of each branch: K = 2 for pairs, the most responses of any row for rankings, 0 where a row has fewer.
      head_lengths: [N, K] int32, positions that a head must visit: loss tokens and the last token; zero for prompts.
      stats: what became of the files' rows, see `encode.Stats`.
      ref_logps: gives a row's reference log-probs, its branches behind each other, if they are cached (`references`).
    """

    def __init__(self, folder: str, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.ref_logps: Callable[[int], np.ndarray] | None = None
        self.digest = os.path.basename(folder).rpartition("-")[2]  # of files, tokenizer, template and options
        with open(os.path.join(folder, "stats.json"), encoding="utf-8") as stream:
            self.stats: dict[str, Any] = json.load(stream)
        self.lengths: np.ndarray = np.load(os.path.join(folder, "lengths.npy"))
        self.head_lengths: np.ndarray = np.load(os.path.join(folder, "head_lengths.npy"))
        self._source = _tfds().builder_from_directory(os.path.join(folder, "rows", "1.0.0")).as_data_source(SPLIT)
        if len(self._source) != len(self.lengths):
            raise UserError(f"prepared set {folder} expected {len(self.lengths)} rows, got {len(self._source)}; delete the folder")
        self._kept: dict[int, Row] | None = {} if int(self.lengths.sum()) <= _IN_MEMORY else None
        self._lock = threading.Lock()  # prefetching reads beside validation

    def __len__(self) -> int:
        return len(self.lengths)

    def refer(self, ref_logps: Callable[[int], np.ndarray]) -> None:
        """Has rows come with `ref_logps`, the log-probs that this gives for their number."""
        self.ref_logps = ref_logps
        if self._kept:
            self._kept.clear()

    def __getitem__(self, index: int) -> Row:
        """Row `index`, 0 ≤ index < N, as the encoder made it.

        Raises:
          IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a set of {len(self)}")
        with self._lock:
            if self._kept is not None and index in self._kept:
                return self._kept[index]
            row = {k: v.decode() if isinstance(v, bytes) else v for k, v in self._source[int(index)].items()}
            if self.ref_logps is not None:
                row["ref_logps"] = self.ref_logps(index)
            if self._kept is not None:
                self._kept[index] = row
            return row


def branches(row: Row) -> list[tuple[np.ndarray, ...]]:
    """(tokens, loss mask) of a row's responses, best first; one where it does not compare any, and a prompt's mask is empty. A third array holds
    the reference's log-probs where they are cached.

    Args:
      row: of any kind, as the encoder made it.
    """
    if "tokens" not in row:
        found = [(row[f"{name}_tokens"], row[f"{name}_mask"]) for name in PAIR]
    elif "sizes" in row:
        ends = np.cumsum(row["sizes"])[:-1]
        found = list(zip(np.split(row["tokens"], ends), np.split(row["loss_mask"], ends)))
    else:
        found = [(row["tokens"], row.get("loss_mask", np.zeros(0, bool)))]
    if "ref_logps" not in row:
        return list(found)
    cached = np.split(row["ref_logps"], np.cumsum([len(tokens) for tokens, _ in found])[:-1])
    return [(*branch, logps) for branch, logps in zip(found, cached)]


def _build(folder: str, kind: str, files: list[str], encoder: Encoder, identity: dict[str, Any]) -> None:
    parent, name = os.path.split(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    _sweep(parent)
    temporary = os.path.join(parent, f".{name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        os.makedirs(temporary)
        _write(temporary, kind, files, encoder, identity)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not os.path.isdir(folder):  # else another process was faster, with the same rows
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(temporary: str, kind: str, files: list[str], encoder: Encoder, identity: dict[str, Any]) -> None:
    lengths: list[list[int]] = []
    head_lengths: list[list[int]] = []
    failure: list[UserError] = []  # TFDS rewords what passes through it

    def rows() -> Iterator[tuple[int, Row]]:
        try:
            for record in read_records(kind, files):
                for row in encoder(record):
                    lengths.append([len(tokens) for tokens, _ in branches(row)])
                    head_lengths.append([_head_length(mask) for _, mask in branches(row)])
                    yield len(lengths) - 1, row | {"source": os.path.basename(row["source"])}  # the key is a running number: no duplicates
        except UserError as error:
            failure.append(error)
            raise

    try:
        _builder_class()(rows, kind, data_dir=temporary, file_format="array_record").download_and_prepare()
    except Exception:
        if failure:
            raise failure[0] from None
        if encoder.stats.read and not encoder.stats.kept:
            raise UserError(f"{files[0]}:1 rows expected at least one to be kept, got none; see config.data.overlong") from None
        raise
    shutil.rmtree(os.path.join(temporary, "downloads"), ignore_errors=True)
    np.save(os.path.join(temporary, "lengths.npy"), _rectangular(lengths))
    np.save(os.path.join(temporary, "head_lengths.npy"), _rectangular(head_lengths))
    stats = encoder.stats.as_dict() | {"kind": kind, "identity": identity, "longest": int(_rectangular(lengths).max())}
    with open(os.path.join(temporary, "stats.json"), "w", encoding="utf-8") as stream:
        json.dump(stats, stream, indent=1, sort_keys=True)


def _head_length(mask: np.ndarray) -> int:
    return int(mask.sum()) + int(not mask[-1]) if len(mask) else 0


def _rectangular(rows: list[list[int]]) -> np.ndarray:
    """[N, K] int32, short rows filled up with 0."""
    found = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found


def _sweep(parent: str) -> None:
    """Removes what killed builds of this machine left."""
    for name in os.listdir(parent):
        parts = name.split(".")
        if len(parts) >= 5 and name.startswith(".") and ".".join(parts[2:-2]) == socket.gethostname() and not _alive(parts[-2]):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def _alive(pid: str) -> bool:
    with contextlib.suppress(ProcessLookupError, ValueError):
        try:
            os.kill(int(pid), 0)
        except PermissionError:
            return True
        return True
    return False


def _sha256(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.cache
def _tfds():
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    return tfds


@functools.cache
def _builder_class():
    tfds = _tfds()
    features = tfds.features
    tokens = functools.partial(features.Tensor, shape=(None,), dtype=np.int32)
    mask = functools.partial(features.Tensor, shape=(None,), dtype=np.bool_)

    def of_kind(kind: str):
        fields = {"source": features.Text(), "line": features.Scalar(np.int64)}
        if kind == "preference":
            fields |= {"margin": features.Scalar(np.float32)}
            for name in PAIR:
                fields |= {f"{name}_tokens": tokens(), f"{name}_mask": mask()}
        elif kind == "prompt":
            fields |= {"tokens": tokens(), "messages": features.Text(), "reference": features.Text()}
        else:
            fields |= {"tokens": tokens(), "loss_mask": mask()}
        more = {
            "ranking": {"sizes": tokens()}, "feedback": {"desirable": features.Scalar(np.bool_)}, "rating": {"score": features.Scalar(np.float32)},
            "stepwise": {"steps": tokens(), "labels": mask()},
        }
        return features.FeaturesDict(fields | more.get(kind, {}))

    class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[name-defined,call-arg]
        """Rows of one kind in the order of their files."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = url_infos = None  # nothing is downloaded; TFDS 4.9.10 would need importlib_resources, which it does not declare

        def __init__(self, rows, kind, **options):
            self._make_rows, self._kind = rows, kind
            super().__init__(**options)

        def _info(self):
            description = f"{self._kind} rows of local JSONL"
            return tfds.core.DatasetInfo(builder=self, description=description, features=of_kind(self._kind), disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {SPLIT: self._generate_examples()}

        def _generate_examples(self):
            return self._make_rows()

        def _log_download_bytes(self):
            pass  # TFDS would print a download of unknown size

        def _log_download_done(self):
            pass

    return Rows
