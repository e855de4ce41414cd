"""A wall-clock limit on a call into code that is not ours.

In the main thread an alarm signal interrupts the call wherever it is: a busy loop, a wait, a regular expression that backtracks. In any other thread
Python cannot interrupt it: it then runs in a thread of its own, which is left behind when the time is up and goes on until it ends by itself.
A single call into C that neither looks for signals nor lets go of the interpreter outlasts both.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class _Alarm(BaseException):
    """Raised by the signal's handler; no `except Exception` of the called code catches it."""


def call_within(seconds: float, call: Callable[[], T]) -> T:
    """`call()`, or TimeoutError when it takes longer.

    Args:
      seconds: ≥ 0; 0 = as long as it takes.
      call: without arguments.

    Raises:
      TimeoutError: the time is up. Whatever the call itself raises is passed on.
    """
    if not seconds:
        return call()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _alarmed(seconds, call)
    return _in_a_thread(seconds, call)


def _alarmed(seconds: float, call: Callable[[], T]) -> T:
    def ring(*_: Any) -> None:
        raise _Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Alarm:
        raise TimeoutError(f"it took longer than {seconds:g} s") from None
    finally:
        signal.signal(signal.SIGALRM, before)


def _in_a_thread(seconds: float, call: Callable[[], T]) -> T:
    outcome: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:
            outcome.append((False, error))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)
    if not outcome:
        raise TimeoutError(f"it took longer than {seconds:g} s")
    returned, value = outcome[0]
    if not returned:
        raise value
    return value
