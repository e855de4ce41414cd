"""A thread that makes calls one after the other, and that nobody waits for when the program ends.

concurrent.futures joins its threads at exit: a run that an error or Ctrl-C ended would hang until a slow judge has answered.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Worker:
    """Makes calls in their order.

    Args:
      name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """What the call will return, or raise."""
        future: Future[Any] = Future()
        self._calls.put((future, call, arguments))
        return future

    def close(self) -> None:
        """Drops what is not begun; the thread ends after what is."""
        while not self._calls.empty():
            if (waiting := self._calls.get()) is not None:
                waiting[0].cancel()
        self._calls.put(None)

    def _work(self) -> None:
        while (next_one := self._calls.get()) is not None:
            future, call, arguments = next_one
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call(*arguments))
                except BaseException as error:
                    future.set_exception(error)
