"""`rlhf-jax train`, killed by SIGKILL at a chosen moment: `python -m tests.train.killed POINT NUMBER SECONDS ARGUMENTS…`.

SECONDS after the NUMBER-th call of POINT begins, whatever runs then. SIGKILL is the same whoever sends it: no handler, no clean-up.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from rlhf_jax import checkpoint
from rlhf_jax.cli.main import run
from rlhf_jax.rewards import host
from rlhf_jax.train import loop, metrics, programs

POINTS: dict[str, tuple[Any, str]] = {
    "training": (programs.Programs, "advance"),  # a fused iteration's rollout too
    "saving": (checkpoint.Checkpointer, "save"),  # the writing goes on in the background after it
    "validation": (programs.Programs, "validate"),
    "rewarding": (host, "call_reward_fn"),  # between rollout and step
    "logging": (metrics.MetricsLog, "flush"),
    "sampling": (loop, "completions"),
}


def before(owner: Any, name: str, number: int, act: Callable[[], None]) -> None:
    """Calls `act` when `owner.name` is called for the `number`-th time."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _kill(seconds: float) -> None:
    end = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if seconds == 0:
        end()
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    point, number, seconds, *rest = sys.argv[1:]
    before(*POINTS[point], int(number), lambda: _kill(float(seconds)))
    sys.exit(run("train", rest))
