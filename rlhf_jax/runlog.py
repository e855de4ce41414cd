"""The lines of a run's log, metrics.jsonl and timing.jsonl: one JSON object each, with its step. Who writes them is train, who draws them report."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from rlhf_jax.errors import UserError


def records(path: epath.PathLike) -> list[tuple[bytes, dict[str, Any]]]:
    """(line, parsed line) of every complete line; a last one cut short by a kill is left out. Without a file: [].

    Args:
      path: local or gs://.

    Raises:
      UserError: a line is not one of ours.
    """
    path, found = epath.Path(path), []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), start=1):
        if not line.endswith(b"\n"):
            break  # torn: the process was killed while writing
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}:{number} is not a line of the log ({line[:60]!r}): remove it") from error
        found.append((line, record))
    return found
