"""Ends a process whose run stands still: a peer that lives but is stuck, a reward that never answers. JAX notices only peers that are dead.

The loop says what it does and since when; a thread of its own looks at the clock. On expiry all threads' stacks go to stderr and the process ends at
once, with an exit code that tells a launcher to start the same command again: the last checkpoint is intact, and the run goes on from it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

import jax

HUNG = 76  # exit code; 75 is preempted (cli.main)
PATIENCE = 10.0  # validations and saves may take so many times as long as a step


class Watchdog:
    """Watches one thing at a time; a context manager, in which its thread lives.

    The first of each kind is not watched, since it compiles, and how long that takes nobody knows.

    Args:
      seconds: config.run.watchdog, what a step may take; 0 = off.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: tuple[float, str] | None = None  # (when, what)
        self._seen: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True) if seconds else None

    @contextlib.contextmanager
    def watching(self, what: str, step: int, patience: float = 1.0) -> Iterator[None]:
        """Ends the process if the block takes longer than `patience` times a step; blocks do not nest.

        Args:
          what: the kind of work, for the message.
          step: of the run.
          patience: see PATIENCE.
        """
        if what in self._seen:
            self._due = (time.monotonic() + patience * self._seconds, f"{what} at step {step} has not ended after {patience * self._seconds:g} s")
        try:
            yield
        finally:
            self._due = None
        self._seen.add(what)

    def __enter__(self) -> Watchdog:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while not self._end.wait(min(self._seconds / 4, 1.0)):
            due = self._due
            if due is not None and time.monotonic() > due[0]:
                self._bark(due[1])

    def _bark(self, said: str) -> None:
        print(f"rlhf-jax: config.run.watchdog = {self._seconds:g}: {said} on host {jax.process_index()} of {jax.process_count()}; the same command "
              "goes on from the last checkpoint; the stacks of all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=2, all_threads=True)  # by number: sys.stderr may be something else
        os._exit(HUNG)
