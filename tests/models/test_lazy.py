"""A parameter that is not read yet gives the array that it stands for, whole, stacked, or an entry of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import layout
from rlhf_jax.models.lazy import Lazy, common_dtype

RNG = np.random.default_rng(0)
ARRAYS = [RNG.normal(size=(2, 3)).astype(np.float32) for _ in range(4)]


def counted(array, reads):
    """A `Lazy` of one piece that notes when it is read."""
    return Lazy(array.shape, array.dtype, (((), lambda: reads.append(1) or array),))


def test_one_piece_is_read_when_it_is_asked_for_and_each_time():
    reads = []
    leaf = counted(ARRAYS[0], reads)
    assert reads == [] and Lazy.of(leaf) is leaf
    np.testing.assert_array_equal(np.asarray(leaf), ARRAYS[0], strict=True)
    np.testing.assert_array_equal(np.asarray(leaf, dtype=np.float64), ARRAYS[0].astype(np.float64), strict=True)
    assert reads == [1, 1]


def test_a_stack_of_stacks_and_its_entries():
    reads = []
    inner = [Lazy.stack([counted(x, reads) for x in ARRAYS[i : i + 2]]) for i in (0, 2)]
    outer = Lazy.stack(inner)
    assert outer.shape == (2, 2, 2, 3) and [at for at, _ in outer.pieces] == [(0, 0), (0, 1), (1, 0), (1, 1)] and reads == []
    np.testing.assert_array_equal(np.asarray(outer), np.stack(ARRAYS).reshape(2, 2, 2, 3), strict=True)
    reads.clear()
    np.testing.assert_array_equal(np.asarray(outer[1]), np.stack(ARRAYS[2:]), strict=True)
    np.testing.assert_array_equal(np.asarray(outer[1][0]), ARRAYS[2], strict=True)
    assert len(reads) == 3  # of the pieces that it holds alone


def test_an_entry_of_one_piece_is_a_copy_of_its_own():
    whole = np.stack(ARRAYS)
    entry = np.asarray(Lazy.of(whole)[2])
    np.testing.assert_array_equal(entry, ARRAYS[2], strict=True)
    assert not np.shares_memory(entry, whole)
    for index in (4, -1):
        with pytest.raises(IndexError, match=f"entry {index} of 4"):
            Lazy.of(whole)[index]


def test_a_stack_of_several_dtypes_holds_them_all_exactly():
    half, brain = ARRAYS[0].astype(np.float16), ARRAYS[1].astype(jnp.bfloat16)
    stacked = Lazy.stack([half, brain])
    assert stacked.dtype == np.float32 == common_dtype([np.float16, jnp.bfloat16]) and common_dtype([jnp.bfloat16] * 2) == jnp.bfloat16
    assert common_dtype([]) == np.float32
    np.testing.assert_array_equal(np.asarray(stacked), np.stack([half.astype(np.float32), brain.astype(np.float32)]), strict=True)
    np.testing.assert_array_equal(np.asarray(stacked[1]), brain.astype(np.float32), strict=True)


def test_other_shapes_do_not_stack():
    with pytest.raises(ValueError, match="do not stack"):
        Lazy.stack([ARRAYS[0], ARRAYS[1].T])


def test_map_works_on_each_piece():
    reads = []
    leaf = Lazy.stack([counted(x, reads) for x in ARRAYS[:2]]).map(lambda piece: piece.sum(1).astype(np.float16), (2, 2), np.float16)
    assert reads == [] and leaf.shape == (2, 2)
    np.testing.assert_array_equal(np.asarray(leaf), np.stack([x.sum(1).astype(np.float16) for x in ARRAYS[:2]]), strict=True)


def test_layouts_of_what_is_not_read_yet():
    reads = []
    tree = {"ends": {}, "layers": {str(i): {"kernel": counted(x, reads)} for i, x in enumerate(ARRAYS)}}
    running = layout.to_runtime(tree, 2)
    back = layout.to_canonical(running)
    assert reads == [] and [leaf.shape for leaf in jax.tree.leaves(running)] == [(2, 2, 3)] * 2
    for i, array in enumerate(ARRAYS):
        np.testing.assert_array_equal(np.asarray(back["layers"][str(i)]["kernel"]), array, strict=True)
