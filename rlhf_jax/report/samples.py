"""What a run said while it trained: the last steps of its samples.jsonl as rows for the page.

Bounded in rows and in characters, whatever the file holds: a long answer is cut in its middle, and the rows that are left out are counted. The text
is the model's; the page's template escapes it.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
from typing import Any

SAMPLES_FILE = "samples.jsonl"
_STEPS, _ROWS = 3, 6  # the last steps, and rows of each
_CHARACTERS = 1200  # of a prompt, a response or a reason


def sampled(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The completions of a run's last logged steps.

    Args:
      workdir: a run's folder.

    Returns:
      rows: by step, then in the file's order: {step, prompt, response, ended, score, rewards, failed}; score None where there is none, rewards and
        failed {label: number or None} and {label: reason}.
      labels: of all rewards and failures in these rows, sorted.
      left_out: rows of these steps that are not among them.
      None without a file, or without a row in it.
    """
    path = pathlib.Path(workdir) / SAMPLES_FILE
    if not path.exists():
        return None
    kept: dict[int, list[dict[str, Any]]] = {}
    counted: collections.Counter[int] = collections.Counter()
    with path.open("rb") as file:  # one line at a time: a long run's file is larger than what is shown of it
        for line in file:
            row = _parsed(line)
            if row is None:
                continue
            counted[row["step"]] += 1
            rows = kept.setdefault(row["step"], [])
            if len(rows) < _ROWS:
                rows.append(row)
            while len(kept) > _STEPS:
                del kept[min(kept)]
    found = [_shown(row) for step in sorted(kept) for row in kept[step]]
    if not found:
        return None
    labels = sorted({label for row in found for part in ("rewards", "failed") for label in row[part]})
    return {"rows": found, "labels": labels, "left_out": sum(counted[step] - len(kept[step]) for step in kept)}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A whole row that is not filler; None for a torn line."""
    try:
        row = json.loads(line)
        return row if row["messages"] is not None and isinstance(row["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["messages"]
    prompt = messages[0]["content"] if len(messages) == 1 else "\n".join(f"{one.get('role')}: {one.get('content')}" for one in messages)
    failed = {label: _short(str(reason)) for label, reason in row.get("failed", {}).items()}
    return {"step": row["step"], "prompt": _short(str(prompt)), "response": _short(str(row.get("response", ""))), "ended": row.get("ended", True),
            "score": row.get("score"), "rewards": row.get("rewards", {}), "failed": failed}


def _short(text: str) -> str:
    if len(text) <= _CHARACTERS:
        return text
    half = _CHARACTERS // 2
    return f"{text[:half]} … ({len(text) - 2 * half} characters) … {text[-half:]}"
