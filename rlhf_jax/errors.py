"""The one exception for a user's mistake, which the command line prints as its sentence, without a traceback; and what a process's exit code says."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

DONE, CRASHED, MISTAKE, PREEMPTED = 0, 1, 2, 75  # 75: the state is saved, and the same command goes on (sysexits' EX_TEMPFAIL)


class UserError(ValueError):
    """A config key or file:line, the value found there, and the remedy, in one sentence."""


def nearest(name: str, legal: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the legal name most like `name`, or the list of legal names when none is near."""
    names = sorted(legal)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f"; legal names are {', '.join(names) or 'none'}"
