"""The one exception for a user's mistake; the command line prints its sentence and exits with 2, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A config key or file:line, the value found there, and the remedy, in one sentence."""


def nearest(name: str, legal: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the legal name most like `name`, or the list of legal names when none is near."""
    names = sorted(legal)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f"; legal names are {', '.join(names) or 'none'}"
