"""The safetensors format, one tensor in memory at a time: an 8-byte little-endian length, a JSON header, then the tensors' bytes.

The reader checks the header against the file before anything is read, and reads a tensor with one call at its offset; the writer takes functions
that return the tensors, casts them block by block, and digests what it writes. Why not the `safetensors` library: by default it maps a whole shard,
whose pages count as resident, and it writes a shard only from tensors that are all in memory; tests hold the two against each other.
See: https://huggingface.co/docs/safetensors#format.
Deviation: types that are not floating-point are listed and refused when read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError

FLOATS = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8,
    "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}
LENGTH = 8  # bytes before the header
HEADER_LIMIT = 100_000_000  # bytes, as in the library
METADATA = "__metadata__"
BLOCK = 1 << 24  # bytes of a tensor that are cast and written at once
LFS = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: what it is and where it lies."""

    file: Path
    name: str
    kind: str  # its type in the format's words, one of BITS
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    size: int  # bytes

    @property
    def readable(self) -> bool:
        """Whether it is floating-point."""
        return self.kind in FLOATS

    @property
    def dtype(self) -> np.dtype:
        """NumPy's dtype.

        Raises:
          UserError: the type is not floating-point.
        """
        if not self.readable:
            raise UserError(f"{self.file}: tensor {self.name!r} is {self.kind}, and only {', '.join(FLOATS)} can be read; save the model unquantised")
        return FLOATS[self.kind]

    def read(self) -> np.ndarray:
        """The whole tensor, in memory of its own.

        Raises:
          UserError: the type is not floating-point, or the file has shrunk since it was opened.
        """
        count = math.prod(self.shape)
        values = np.fromfile(self.file, dtype=self.dtype, count=count, offset=self.offset)
        if values.size != count:
            raise UserError(f"{self.file} was cut short while it was read: tensor {self.name!r} is not all there; download the file again")
        return values.reshape(self.shape)

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, at most BLOCK of them at a time."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.size, BLOCK):
                yield file.read(min(BLOCK, self.size - start))


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, in the order in which they lie there.

    Raises:
      UserError: it is no safetensors file, is truncated, or its header contradicts itself or the file.
    """
    header, start, total = _parse(path)
    tensors = [_entry(path, name, record, start) for name, record in header.items() if name != METADATA]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.offset + tensor.size))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            verb = "overlaps the tensor before it" if tensor.offset < end else f"leaves {tensor.offset - end} bytes unused before it"
            raise _damaged(path, f"tensor {tensor.name!r} {verb}")
        end += tensor.size
    if end != total:
        what = "so it is truncated" if end > total else "with bytes after the last tensor"
        raise _damaged(path, f"its header describes {end} bytes and the file has {total}, {what}")
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: Path) -> dict[str, str]:
    """What the writer of a file said of it, e.g. {"format": "pt"}.

    Raises:
      UserError: it is no safetensors file.
    """
    return _parse(path)[0].get(METADATA, {})


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path} is not an intact safetensors file: {problem}; download or export it again")


def _parse(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's object, without repeated names and with sound metadata; where the tensors' bytes begin; the file's size."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the name {name!r} is there twice")
            found[name] = value
        return found

    text, total = _header_text(path)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _damaged(path, f"its header cannot be parsed ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object of tensors")
    metadata = header.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"{METADATA} is not a mapping from text to text")
    return header, LENGTH + len(text), total


def _header_text(path: Path) -> tuple[bytes, int]:
    """The header's bytes and the file's size."""
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            first = file.read(len(LFS))
            if first == LFS:
                raise UserError(f"{path} is a Git LFS pointer and not the weights: run `git lfs pull` beside it, or download the file again")
            if total < LENGTH:
                raise _damaged(path, f"it has {total} bytes, fewer than the {LENGTH} before a header")
            (length,) = struct.unpack("<Q", first[:LENGTH])
            if length > HEADER_LIMIT:
                raise _damaged(path, f"its header would have {length} bytes, more than {HEADER_LIMIT}")
            if LENGTH + length > total:
                raise _damaged(path, f"its header has {length} bytes and the whole file {total}, so it is truncated")
            file.seek(LENGTH)
            return file.read(length), total
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the path and its permissions") from error


def _entry(path: Path, name: str, record: Any, start: int) -> Tensor:
    """One checked entry of the header; `start` is where the tensors' bytes begin."""
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    kind, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(kind, str) or kind not in BITS:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {kind!r}")
    if not _naturals(shape):
        raise _damaged(path, f"tensor {name!r} has the shape {shape!r}, which is no list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"tensor {name!r} has the data_offsets {offsets!r}, which are no range of bytes")
    bits = math.prod(shape) * BITS[kind]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _damaged(path, f"tensor {name!r} of {kind} {shape} takes {bits / 8:g} bytes and its data_offsets span {offsets[1] - offsets[0]}")
    return Tensor(path, name, kind, tuple(shape), start + offsets[0], offsets[1] - offsets[0])


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)


# --- writing ---


@dataclasses.dataclass(frozen=True)
class Output:
    """One tensor to write; `read` is called once, when its turn comes, and what it returns is cast to `dtype`."""

    name: str
    dtype: np.dtype  # one of FLOATS' values
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, outputs: Sequence[Output], metadata: Mapping[str, str] | None = None) -> str:
    """Writes a file, whole or not at all, holding one tensor at a time.

    Args:
      path: the file; an existing one is replaced.
      outputs: the tensors, kept in this order (those of wider dtypes first, so that each is aligned).
      metadata: the header's own; None is {"format": "pt"}, which readers of PyTorch models ask for.

    Returns:
      SHA-256 of the file, in hex.

    Raises:
      UserError: a finite value does not fit the dtype.
    """
    kinds = {dtype: kind for kind, dtype in FLOATS.items()}
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    header: dict[str, Any] = {METADATA: {"format": "pt"} if metadata is None else dict(metadata)}
    at = 0
    for output in ordered:
        if output.name in header:
            raise ValueError(f"two tensors are named {output.name!r}")
        header[output.name] = {"dtype": kinds[output.dtype], "shape": list(output.shape), "data_offsets": [at, at + output.size]}
        at += output.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH)
    digest = hashlib.sha256()
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for block in (struct.pack("<Q", len(text)), text):
                digest.update(block)
                file.write(block)
            for output in ordered:
                for values in _cast(output):
                    digest.update(values)
                    file.write(values)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return digest.hexdigest()


def _cast(output: Output) -> Iterator[memoryview]:
    """The tensor's bytes in its dtype, a block of rows at a time, so that neither the cast nor a transposition is ever whole."""
    array = output.read()
    if array.shape != output.shape:
        raise ValueError(f"{output.name!r} was announced as {output.shape} and came as {array.shape}")
    rows = array.reshape(1, -1) if array.ndim < 2 else array
    step = max(1, BLOCK * len(rows) // max(1, output.size))
    for start in range(0, len(rows) if output.size else 0, step):
        given = rows[start : start + step]
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(given, dtype=output.dtype)
        if given.dtype != output.dtype and (np.isinf(values) & np.isfinite(given)).any():
            raise UserError(f"tensor {output.name!r} holds values beyond the range of {output.dtype.name}: export it as bfloat16 or float32")
        yield values.reshape(-1).view(np.uint8).data
