"""Packing rows of "lengths" into rows of 8: "bfd", and two that cut rows, which we never do."""

from __future__ import annotations

import numpy as np

from rlhf_jax.data.packing import pack
from tests.conformance.runner import Comparison, Deviation, NoFunction

CUT = "a row is never cut: text is chunked before packing, with one token of overlap; a long conversation is truncated, skipped or refused"


def cases(vectors):
    names = [name for name in vectors if name not in ("lengths", "input_ids")]
    return [(name, lambda name=name: _case(vectors, name)) for name in names]


def _case(v, name):
    if name in ("bfd_split", "wrapped"):
        raise Deviation(CUT)
    if name != "bfd":
        raise NoFunction(name)
    theirs = v[name]["seq_lengths"]
    capacity = max(map(sum, theirs))
    lengths = np.minimum(v["lengths"], capacity)
    packs = pack(np.arange(len(lengths)), lengths, capacity)
    ours = sorted([sorted(lengths[rows], reverse=True) for rows in packs], reverse=True)
    theirs = sorted([sorted(lengths_, reverse=True) for lengths_ in theirs], reverse=True)
    widest = max(map(len, ours + theirs))
    square = lambda rows: np.array([[*row, *[0] * (widest - len(row))] for row in rows])  # noqa: E731
    yield Comparison("lengths of every pack", square(ours), square(theirs))
