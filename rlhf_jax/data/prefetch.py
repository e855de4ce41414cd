"""Batches made ahead of their use, in one background thread, in order."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T], Iterator[T]):
    """Iterates over fn(start), fn(start + 1), …; an exception of `fn` is raised where its value was due.

    Use it in a `with` block, or call `close`: the thread ends then, whatever is still queued.

    Args:
      fn: makes value i; runs in the background thread only.
      start, stop: the range of i; stop None never ends.
      depth: values made ahead, ≥ 1.
    """

    def __init__(self, fn: Callable[[int], T], start: int, stop: int | None, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._fn = fn
        self._range: Iterable[int] = itertools.count(start) if stop is None else range(start, stop)
        self._queue: queue.Queue[tuple[str, object]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for index in self._range:
                if not self._put(("value", self._fn(index))):
                    return
            self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))

    def _put(self, item: tuple[str, object]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def __next__(self) -> T:
        what, value = self._get()
        if what == "value":
            return value  # type: ignore[return-value]
        self.close()
        if what == "error":
            raise value  # type: ignore[misc]
        raise StopIteration

    def _get(self) -> tuple[str, object]:
        while not self._closed.is_set():
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                pass
        return "end", None

    def close(self) -> None:
        """Ends the thread; more calls change nothing."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
