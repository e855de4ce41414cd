"""Calls in a thread of their own: in their order, one at a time, and left behind at exit."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from rlhf_jax.train import worker


def test_calls_are_made_in_order_and_their_errors_passed_on() -> None:
    made: list[int] = []
    thread = worker.Worker("calls")
    futures = [thread.submit(made.append, number) for number in range(5)]
    failing = thread.submit(int, "x")
    assert [future.result() for future in futures] == [None] * 5 and made == list(range(5))
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result()
    assert thread.submit(lambda: threading.current_thread().name).result() == "calls"
    thread.close()


def test_what_is_not_begun_is_dropped() -> None:
    begun, go = threading.Event(), threading.Event()
    thread = worker.Worker("calls")
    running = thread.submit(lambda: (begun.set(), go.wait(10)))
    waiting = thread.submit(int)
    begun.wait(10)
    thread.close()
    go.set()
    assert running.result() == (None, True)
    with pytest.raises(CancelledError):
        waiting.result()


def test_a_call_that_takes_long_does_not_keep_the_program() -> None:
    """Without jax: the module alone. An executor of concurrent.futures would be waited for."""
    code = f"import runpy, time; Worker = runpy.run_path({worker.__file__!r})['Worker']; Worker('x').submit(time.sleep, 60); raise SystemExit(3)"
    assert subprocess.run([sys.executable, "-c", code], timeout=20, check=False).returncode == 3
