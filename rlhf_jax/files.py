"""Files that stand whole under their name, or not at all; and files that grow by lines, in a bucket too."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TextIO

from etils import epath

SECONDS = 30.0  # between two copies of a growing file to a bucket


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """A text file to write in the block, which grows beside `path` and takes its name when the block ends well; else nothing is left.

    Args:
      path: a local file; its folder is made.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    with whole(path) as stream:
        stream.write(text)


class Growing:
    """A file to add lines to. On disk every line is handed to the system at once. An object in a bucket cannot be appended to (gcsfs starts anew
    instead): its content is kept here and written whole, now and then, on `flush` and on `close`.

    Args:
      path: local or gs://…; what it holds stays.
    """

    def __init__(self, path: epath.Path) -> None:
        self._path, self._remote = path, "://" in os.fspath(path)
        self._lines = bytearray(path.read_bytes() if self._remote and path.exists() else b"")
        self._copied, self._when = len(self._lines), time.monotonic()
        self._file = None if self._remote else path.open("ab")

    def write(self, line: bytes) -> None:
        """Adds a line, its end included."""
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._lines += line
        if time.monotonic() - self._when >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Returns when all lines are where the path says."""
        if self._file is None and self._copied < len(self._lines):
            self._path.write_bytes(bytes(self._lines))
            self._copied, self._when = len(self._lines), time.monotonic()

    def close(self) -> None:
        """Flushes; nothing is written afterwards."""
        self.flush()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Growing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
