"""Files that stand whole under their name, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import TextIO


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
