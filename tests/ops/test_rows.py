"""Splitting, joining and shuffling a batch: groups that share a prompt stay together, and nothing else changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import rows
from rlhf_jax.types import Sequences


def batch(size: int, group: int | None) -> dict[str, object]:
    ids = jnp.arange(size * 2).reshape(size, 2)
    mask = jnp.ones((size, 2), bool)
    return {"row": jnp.arange(size), "seqs": Sequences(tokens=ids, positions=ids, segment_ids=ids, loss_mask=mask, prefix=group and (group, 1))}


@pytest.mark.parametrize(("group", "wanted"), [(None, [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]), (3, [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]])])
def test_parts_hold_whole_groups(group: int | None, wanted: list[list[int]]) -> None:
    parts = rows.interleave(batch(12, group), 2)
    assert parts["row"].tolist() == wanted and parts["seqs"].prefix == (group and (group, 1))
    np.testing.assert_array_equal(parts["seqs"].tokens[..., 0] // 2, parts["row"])
    back = rows.joined(parts["row"], rows.group_size(batch(12, group)))
    assert back.tolist() == list(range(12))


def test_groups_that_do_not_divide_are_taken_apart() -> None:
    whole = batch(12, 3)
    assert rows.group_size(rows.divisible(whole, 2)) == 3 and rows.group_size(rows.divisible(whole, 3)) == 1
    assert rows.divisible(whole, 3)["seqs"].prefix == (1, 1), "what is read does not change"
    with pytest.raises(ValueError, match="12 rows in groups of 3 do not split into 3 parts"):
        rows.interleave(whole, 3)


def test_groups_are_shuffled_whole() -> None:
    found = rows.shuffled(batch(12, 3), jax.random.key(0))
    by_group = found["row"].reshape(4, 3)
    np.testing.assert_array_equal(by_group - by_group[:, :1], [[0, 1, 2]] * 4)
    assert sorted(found["row"].tolist()) == list(range(12)) != found["row"].tolist()
    np.testing.assert_array_equal(found["seqs"].tokens[:, 0] // 2, found["row"])
