"""How long to wait after failures in a row, here and on the machines."""

from __future__ import annotations

FIRST, LONGEST = 5.0, 300.0  # seconds


def pause(failures: int) -> float:
    """Seconds before the next try: 5, 10, 20 … and never more than 300.

    Args:
      failures: in a row so far, ≥ 1.
    """
    return min(FIRST * 2.0 ** min(failures - 1, 30), LONGEST)
