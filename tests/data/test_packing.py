import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import packing
from rlhf_jax.data.packing import epoch_order, epoch_plan, pack

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=200).map(np.array)


@given(LENGTHS, st.integers(-(2**63), 2**63 - 1), st.integers(0, 5))
@settings(deadline=None)
def test_a_plan_covers_every_row_exactly_once_and_fits(lengths, seed, epoch):
    plan = epoch_plan(lengths, 32, seed, epoch)
    assert sorted(np.concatenate(plan)) == list(range(len(lengths)))
    assert all(lengths[rows].sum() <= 32 for rows in plan)
    assert all(np.array_equal(x, y) for x, y in zip(plan, epoch_plan(lengths, 32, seed, epoch)))


def test_windows_are_packed_apart_and_cover_all(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 7)
    lengths = np.arange(50) % 9 + 1
    plan = pack(np.arange(50), lengths, 9)
    assert sorted(np.concatenate(plan)) == list(range(50))
    assert all(len({r // 7 for r in rows}) == 1 for rows in plan)


def test_first_fit_decreasing_by_hand():
    lengths = np.array([5, 2, 3, 1, 4, 4])
    assert [p.tolist() for p in pack(np.arange(6), lengths, 8)] == [[0, 2], [4, 5], [1, 3]]


def test_as_tight_as_the_usual_best_fit():
    """TRL 1.16 `bfd` needs six packs of 8 for these, the row of 9 cut to 8."""
    assert len(pack(np.arange(10), np.array([5, 2, 3, 1, 8, 4, 4, 7, 2, 6]), 8)) == 6


def test_epochs_and_seeds_and_streams_differ_and_repeat():
    orders = [epoch_order(50, *key).tolist() for key in ((0, 0), (0, 1), (1, 0), (0, 0, 1))]
    assert len({tuple(o) for o in orders}) == 4
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert epoch_order(50, 0, 0).tolist() == orders[0]
    assert epoch_order(0, 0, 0).tolist() == []


def test_the_order_is_pinned():
    """A change here would change every run: raise `prepare.VERSION` and say so."""
    assert epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_a_row_longer_than_a_pack():
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit a pack of 8"):
        pack(np.arange(1), np.array([9]), 8)
