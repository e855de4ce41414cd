"""A call that takes too long ends, whatever it does, and one that does not is left alone; in the main thread and in another."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_jax.rewards.deadline import call_within


def spin() -> None:
    while True:
        with contextlib.suppress(Exception):  # as careless code does
            sum(range(100))


def elsewhere(work: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.mark.parametrize("slow", [spin, lambda: time.sleep(30), lambda: re.match(r"(a+)+$", "a" * 40 + "b"), lambda: threading.Event().wait(30)])
def test_the_main_thread_is_interrupted(slow: Callable[[], Any]) -> None:
    begun, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"longer than 0\.2 s"):
        call_within(0.2, slow)
    assert time.monotonic() - begun < 5.0
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_another_thread_leaves_it_behind() -> None:
    with pytest.raises(TimeoutError, match=r"longer than 0\.1 s"):
        elsewhere(lambda: call_within(0.1, lambda: time.sleep(1.0)))


@pytest.mark.parametrize("where", [lambda work: work(), elsewhere])
def test_what_is_quick_returns_and_raises_as_it_is(where: Callable[..., Any]) -> None:
    assert where(lambda: call_within(5.0, lambda: 7)) == 7
    assert where(lambda: call_within(0.0, lambda: 7)) == 7
    with pytest.raises(KeyError, match="mine"):
        where(lambda: call_within(5.0, lambda: {}["mine"]))
