import threading
import time

import pytest

from rlhf_jax.data.prefetch import Prefetcher


def alive():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_order_and_end():
    with Prefetcher(lambda i: i * i, 3, 8, depth=2) as values:
        assert list(values) == [9, 16, 25, 36, 49]
        assert list(values) == []
    assert not alive()


def test_an_empty_range():
    assert list(Prefetcher(lambda i: i, 3, 3)) == []


def test_the_queue_is_bounded():
    made = []
    with Prefetcher(lambda i: made.append(i) or i, 0, None, depth=3) as values:
        assert [next(values) for _ in range(2)] == [0, 1]
        deadline = time.monotonic() + 5
        while len(made) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == list(range(6))  # two taken, three queued, one in hand
    assert not alive()


def test_an_exception_comes_where_its_value_was_due():
    def fn(i):
        if i == 2:
            raise KeyError("row 2")
        return i

    values = Prefetcher(fn, 0, None)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(KeyError, match="row 2"):
        next(values)
    with pytest.raises(StopIteration):
        next(values)
    assert not alive()


def test_close_while_the_consumer_waits():
    gate = threading.Event()
    values = Prefetcher(lambda i: gate.wait(5), 0, None)
    got = []
    waiting = threading.Thread(target=lambda: got.extend(values))
    waiting.start()
    threading.Timer(0.1, gate.set).start()
    values.close()
    values.close()
    waiting.join(5)
    assert not waiting.is_alive() and not alive()


def test_depth_must_be_positive():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        Prefetcher(lambda i: i, 0, 1, depth=0)
