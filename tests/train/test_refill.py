"""Dropping groups of equal scores, and replay, against loops in plain Python."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.train import refill, replay
from rlhf_jax.types import Rollout, Sequences

NAN = float("nan")


def rollout(scores: list[float], *, first: int, filler: tuple[int, ...] = (), version: int = 0) -> Rollout:
    """One token per row, which tells it apart: first, first + 1, …"""
    rows = len(scores)
    tokens = first + jnp.arange(rows, dtype=jnp.int32)[:, None]
    real = jnp.asarray([row not in filler for row in range(rows)])[:, None]
    zeros = jnp.zeros(rows, jnp.int32)
    seqs = Sequences(tokens=tokens, positions=jnp.zeros_like(tokens), segment_ids=real.astype(jnp.int32), loss_mask=real)
    return Rollout(seqs=seqs, sampler_logps=-tokens.astype(jnp.float32), prompt_ids=tokens[:, 0], sample_ids=zeros, group_ids=zeros,
                   truncated=real[:, 0], version=zeros + version, scores=jnp.asarray(scores, jnp.float32))


def read(batch: Rollout) -> list[int | None]:
    """The rows by their token, None for filler."""
    return [int(token) if real else None for token, real in zip(batch.seqs.tokens[:, 0], batch.real)]


# --- refill ---


def test_two_rounds_by_hand() -> None:
    """Groups of two: the first round keeps one of three, the second fills two of the three that it offers, one of them with an unknown score."""
    first = refill.fill(None, rollout([1, 1, 0, 1, NAN, 3], first=10), size=2)
    assert read(first.batch) == [12, 13, None, None, None, None]
    assert (int(first.groups), float(first.dropped), float(first.surplus), float(first.rounds)) == (1, 2, 0, 1)
    assert not first.batch.truncated[2:].any() and first.batch.prompt_ids.tolist()[2:] == [-1] * 4 and not first.batch.seqs.loss_mask[2:].any()

    second = refill.fill(first, rollout([5, 6, 7, 8, 9, 8], first=20), size=2)
    assert read(second.batch) == [12, 13, 20, 21, 22, 23]
    assert second.batch.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert second.batch.scores is not None and second.batch.scores.tolist() == [0, 1, 5, 6, 7, 8]
    found = {name: float(mean.compute()) for name, mean in refill.metrics(second).items()}
    assert found == pytest.approx({"rollout/rounds": 2, "rollout/dropped_groups": 2 / 6, "rollout/surplus_groups": 1 / 6, "rollout/filler_rows": 0,
                                   "rollout/sampled_score": (1 + 1 + 0 + 1 + 3 + 5 + 6 + 7 + 8 + 9 + 8) / 11})


def test_nothing_but_equal_scores_leaves_filler_and_filler_is_no_group() -> None:
    found = refill.fill(None, rollout([2, 2, 0, 0, 1, 0], first=1, filler=(4, 5)), size=2)
    assert read(found.batch) == [None] * 6 and (float(found.sampled), float(found.dropped)) == (2, 2)
    assert float(refill.metrics(found)["rollout/filler_rows"].compute()) == 1.0


@pytest.mark.parametrize("seed", [0, 1])
def test_rounds_against_a_loop(seed: int) -> None:
    rng, size, wanted = np.random.default_rng(seed), 2, 6
    fill = jax.jit(lambda before, fresh: refill.fill(before, fresh, size=size))
    kept: list[int] = []
    found: Any = None
    for number in range(4):
        scores = rng.integers(0, 2, wanted * size).astype(float).tolist()
        found = fill(found, rollout(scores, first=100 * number))
        for group in range(wanted):
            pair = scores[2 * group : 2 * group + 2]
            if pair[0] != pair[1] and len(kept) < wanted * size:
                kept += [100 * number + 2 * group, 100 * number + 2 * group + 1]
        assert read(found.batch) == kept + [None] * (wanted * size - len(kept))
    assert float(found.dropped + found.surplus) == 4 * wanted - len(kept) / size


# --- replay ---


@pytest.mark.parametrize("capacity", [4, 8, 12])
def test_replay_against_a_list(capacity: int) -> None:
    """What is drawn was remembered before this iteration, whole groups, none twice, and only the newest groups are; filler is not remembered."""
    size, rows = 2, 4
    mix = jax.jit(lambda memory, fresh, at: replay.mixed(memory, fresh, jax.random.key(1), at, replayed=rows, size=size))
    memory = replay.empty(rollout([0.0] * 6, first=0), capacity)
    remembered: list[int] = []  # the first row of each group, oldest first
    drawn = []
    for at in range(8):
        fresh = rollout([float(at)] * 6, first=10 * at, filler=(2, 3) if at % 3 == 1 else (), version=at)
        again = mix(memory, fresh, jnp.int32(at))[0]
        batch, memory, metrics = mix(memory, fresh, jnp.int32(at))
        assert read(batch) == read(again) and read(batch)[:6] == read(fresh)
        groups = [row for row in read(batch)[6:] if row is not None]
        assert [row + 1 for row in groups[::2]] == groups[1::2]
        assert set(groups[::2]) <= set(remembered) and len(set(groups)) == len(groups) == min(rows, size * len(remembered))
        assert batch.group_ids.tolist()[6:] == [3, 3, 4, 4] or batch.group_ids.tolist()[6:] == [3, 3, 4, 4][: rows]
        for place, row in enumerate(read(batch)):
            if row is not None:
                assert int(batch.version[place]) == row // 10 and float(batch.sampler_logps[place, 0]) == -row
        assert float(metrics["rollout/replayed"].compute()) == pytest.approx(len(groups) / 10)
        remembered = (remembered + [row for row in read(fresh)[::2] if row is not None])[-capacity // size :]
        drawn.append(tuple(groups))
    assert len(set(drawn[2:])) > 1


def test_more_fresh_groups_than_room_keep_the_newest() -> None:
    memory = replay.empty(rollout([0.0] * 6, first=0), 4)
    _, memory, _ = replay.mixed(memory, rollout([0.0] * 6, first=10), jax.random.key(0), jnp.int32(0), replayed=2, size=2)
    assert sorted(token for token in memory.rows.seqs.tokens[:, 0].tolist()) == [12, 13, 14, 15] and int(memory.seen) == 3
