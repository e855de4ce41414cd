"""Batches as an index function: batch s depends on (seed, s) only, on any number of hosts (law 7).

A data set is an endless sequence of epochs, each a permutation (or a packing plan) of all rows; batch s is slots [s·B, (s+1)·B) of that
sequence, so it may straddle epochs while every epoch stays exact. Host i of n makes rows [i·B/n, (i+1)·B/n) of it, or several such blocks, as its
devices lie in the mesh. Shapes are fixed for the whole run: T or P by config, R (`loss_positions`) by the longest row. Leaves are NumPy; nothing
here runs on a device.
A packed epoch holds as many packs as its plan needs, so finding batch s once costs the plans of the epochs before it; they are cached.
"""

from __future__ import annotations

import abc
import copy
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Self, TypeVar

import numpy as np

from rlhf_jax.data.encode import Row
from rlhf_jax.data.packing import Plan, epoch_order, epoch_plan, pack
from rlhf_jax.data.prepare import Prepared, branches
from rlhf_jax.data.records import Message
from rlhf_jax.errors import UserError
from rlhf_jax.types import Comparisons, Prompts, Sequences

Batch = TypeVar("Batch")
_EPOCHS_KEPT = 4
_SHORTEST = 16  # tokens; of rows that are trimmed
EMPTY = np.zeros(0, np.int64)  # the pack of a filler row
Host = tuple[int | tuple[int, ...], int]  # (index, count): this process makes block `index` of `count` equal ones of every batch, or those named
Segment = tuple[np.ndarray, ...]  # tokens, loss mask and, where they are cached, the reference's log-probs, [length] each


def check_batching(batch_size: int, host: Host = (0, 1), group_size: int = 1) -> None:
    """Refuses sizes that do not divide, before anything expensive.

    Raises:
      UserError: batch_size or group_size is not positive, or batch_size is no multiple of the hosts or of group_size.
    """
    blocks, count = _blocks(host)
    for key, value in (("run.batch_size", batch_size), ("sampling.group_size", group_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"config.{key} expected a positive whole number, got {value!r}; raise it")
    for divisor, what in ((count, "hosts"), (group_size, "samples per prompt")):
        if batch_size % divisor:
            remedy = f"choose a multiple of {divisor}"
            raise UserError(f"config.run.batch_size expected a multiple of the {divisor} {what}, got {batch_size}; {remedy}")
    if not blocks or not all(0 <= block < count for block in blocks):
        raise ValueError(f"host {host[0]} of {count}")


def _blocks(host: Host) -> tuple[tuple[int, ...], int]:
    index, count = host
    return (index,) if isinstance(index, int) else tuple(index), count


class Dataset(abc.ABC, Generic[Batch]):
    """What every kind shares: which rows batch s holds, and which of them are this host's.

    Args:
      prepared: the rows.
      batch_size: rows of a global batch, B.
      host: which rows of every batch this process makes.
      pad_id: the token written on padding; any id, padding is told by `segment_ids`.

    Raises:
      UserError: batch_size is not positive or does not divide over the hosts.
    """

    def __init__(self, prepared: Prepared, *, batch_size: int, host: Host = (0, 1), pad_id: int) -> None:
        check_batching(batch_size, host)
        self.prepared, self.batch_size, self.host, self.pad_id = prepared, batch_size, host, pad_id
        self._plans: dict[tuple[int, int], Plan] = {}

    def __len__(self) -> int:
        """Rows of the data set."""
        return len(self.prepared)

    @property
    def stats(self) -> dict[str, Any]:
        """What became of the files' rows: read, kept, truncated, skipped, tokens …"""
        return self.prepared.stats

    def batch(self, index: int, seed: int) -> Batch:
        """This host's rows of training batch `index` ≥ 0."""
        slots = range(index * self._slots, (index + 1) * self._slots)
        return self._build(self._slice(self._packs(slots, seed)))

    def eval_batches(self) -> Iterator[Batch]:
        """This host's rows of batches that hold every row once, in file order, the last one filled up with filler rows."""
        packs = self._eval_plan()
        for begin in range(0, len(packs), self._slots):
            chosen = list(packs[begin : begin + self._slots])
            yield self._build(self._slice(chosen + [EMPTY] * (self._slots - len(chosen))))

    def trimmed(self) -> Self:
        """The same rows for one evaluation, in arrays that hold little else: as long as the longest row, rounded up to a power of two, and no more
        rows to a batch than there are. (A model from elsewhere reads thousands of tokens, and one prompt would be padded to them all.)"""
        found, length = copy.copy(self), _SHORTEST
        found._plans = {}
        while length < int(self.prepared.lengths.max()):
            length *= 2
        found._trim(length)
        return found

    @abc.abstractmethod
    def _trim(self, length: int) -> None: ...

    def batches_for(self, epochs: float, seed: int) -> int:
        """How many batches `epochs` epochs take, rounded up."""
        whole = int(epochs)
        slots = float(self._begin(whole, seed))
        if epochs > whole:
            slots += (epochs - whole) * (self._begin(whole + 1, seed) - slots)
        return math.ceil(slots / self._slots - 1e-9)

    @property
    def _slots(self) -> int:
        """Packs of a global batch."""
        return self.batch_size

    def _plan(self, seed: int, epoch: int) -> Plan:
        return epoch_order(len(self), seed, epoch)[:, None]

    def _eval_plan(self) -> Plan:
        return np.arange(len(self))[:, None]

    def _begin(self, epoch: int, seed: int) -> int:
        """The first slot of an epoch."""
        return epoch * len(self)

    def _epoch(self, slot: int, seed: int) -> int:
        """The epoch that holds a slot."""
        return slot // len(self)

    @abc.abstractmethod
    def _build(self, packs: Sequence[np.ndarray]) -> Batch: ...

    def _slice(self, packs: list[np.ndarray]) -> list[np.ndarray]:
        return [packs[i] for i in self._mine(len(packs))]

    def _mine(self, rows: int) -> np.ndarray:
        """Which of a global batch's rows are this host's, in order."""
        blocks, count = _blocks(self.host)
        size = rows // count
        return np.concatenate([np.arange(block * size, (block + 1) * size) for block in blocks])

    def _packs(self, slots: range, seed: int) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        epoch = self._epoch(slots.start, seed)
        while len(found) < len(slots):
            plan, begin = self._cached_plan(seed, epoch), self._begin(epoch, seed)
            found.extend(plan[max(slots.start - begin, 0) : slots.stop - begin])
            epoch += 1
        return found

    def _cached_plan(self, seed: int, epoch: int) -> Plan:
        plan = self._plans.get((seed, epoch))
        if plan is None:
            while len(self._plans) >= _EPOCHS_KEPT:
                self._plans.pop(next(iter(self._plans)), None)
            plan = self._plans[seed, epoch] = self._plan(seed, epoch)
        return plan


class PaddedData(Dataset[Batch]):
    """What the kinds with rows of T tokens share, padded on the right.

    Args:
      max_length: T.
    """

    def __init__(self, prepared: Prepared, *, max_length: int, **shared: Any) -> None:
        super().__init__(prepared, **shared)
        self.max_length = max_length

    @property
    def loss_slots(self) -> int | None:
        """R: head positions of a row; None = everywhere."""
        return head_slots(self.prepared, self.max_length)

    def _trim(self, length: int) -> None:
        self.max_length = min(length, self.max_length)
        self.batch_size = min(self.batch_size, len(self))

    def _rows(self, packs: Sequence[np.ndarray]) -> list[Row | None]:
        """The row of each pack of one; None for a filler row."""
        return [self.prepared[int(pack_[0])] if len(pack_) else None for pack_ in packs]

    def _padded(self, rows: Sequence[Sequence[Segment]]) -> Sequences:
        return right_padded(rows, self.max_length, self.loss_slots, self.pad_id, referenced=self.prepared.ref_logps is not None)


class SequenceData(PaddedData[Sequences]):
    """Demonstrations and plain text, [B, T], several rows to a pack if `packed`.

    Args:
      packed: put several rows into one, each a segment of its own.
    """

    def __init__(self, prepared: Prepared, *, packed: bool, **shared: Any) -> None:
        super().__init__(prepared, **shared)
        self.packed = packed
        self._ends: dict[int, list[int]] = {}  # by seed: slots up to the end of each epoch planned so far

    @property
    def loss_slots(self) -> int | None:
        """As ever; everywhere in packs, which may hold more head positions than any row."""
        return None if self.packed else super().loss_slots

    def _trim(self, length: int) -> None:
        super()._trim(length)
        self._ends = {}

    def _begin(self, epoch: int, seed: int) -> int:
        if not self.packed or epoch == 0:
            return super()._begin(epoch, seed)
        ends = self._ends.setdefault(seed, [])
        while len(ends) < epoch:
            ends.append((ends[-1] if ends else 0) + len(self._cached_plan(seed, len(ends))))
        return ends[epoch - 1]

    def _epoch(self, slot: int, seed: int) -> int:
        if not self.packed:
            return super()._epoch(slot, seed)
        epoch = 0
        while self._begin(epoch + 1, seed) <= slot:
            epoch += 1
        return epoch

    def _plan(self, seed: int, epoch: int) -> Plan:
        return epoch_plan(self._lengths, self.max_length, seed, epoch) if self.packed else super()._plan(seed, epoch)

    def _eval_plan(self) -> Plan:
        return pack(np.arange(len(self)), self._lengths, self.max_length) if self.packed else super()._eval_plan()

    @property
    def _lengths(self) -> np.ndarray:
        return self.prepared.lengths[:, 0]

    def _build(self, packs: Sequence[np.ndarray]) -> Sequences:
        return self._padded([[segment(self.prepared[int(i)]) for i in pack_] for pack_ in packs])


class ComparisonData(PaddedData[Comparisons]):
    """Pairs and rankings, [B, K, T], the best response first; K is the most responses of any row, a row with fewer ends in empty branches.

    `margin` is None when no row of the files has one, else 0 where a row has none.
    """

    def __init__(self, prepared: Prepared, **shared: Any) -> None:
        super().__init__(prepared, **shared)
        self.branches, self.has_margins = prepared.lengths.shape[1], prepared.stats["margins"] > 0

    def _build(self, packs: Sequence[np.ndarray]) -> Comparisons:
        rows = self._rows(packs)
        flat: list[list[Segment]] = []
        for row in rows:
            found = [[branch] for branch in branches(row)] if row else []
            flat += found + [[]] * (self.branches - len(found))
        seqs = self._padded(flat)
        leaves = {name: leaf.reshape(len(packs), self.branches, -1) for name, leaf in vars(seqs).items() if leaf is not None}
        margin: Any = np.array([row["margin"] if row else 0.0 for row in rows], np.float32) if self.has_margins else None
        return Comparisons(seqs=Sequences(**leaves), margin=margin)


class PromptData(Dataset[Prompts]):
    """Prompts to sample from, [B, P], padded on the left; `group_size` neighbouring rows share a prompt.

    `prompt_ids` are row numbers of the data set. A prompt that comes twice in one batch (at the border of two epochs) goes on counting its
    `sample_ids`, so that no two rows of a batch draw the same random numbers. On filler rows both are −1 and 0.

    Args:
      prompt_length: P.
      group_size: samples per prompt, G; divides batch_size.

    Raises:
      UserError: it does not.
    """

    def __init__(self, prepared: Prepared, *, prompt_length: int, group_size: int, **shared: Any) -> None:
        super().__init__(prepared, **shared)
        check_batching(self.batch_size, self.host, group_size)
        self.prompt_length, self.group_size = prompt_length, group_size

    def _trim(self, length: int) -> None:
        self.prompt_length = min(length, self.prompt_length)
        self.batch_size = min(self.batch_size, len(self) * self.group_size)

    def messages(self, prompt_id: int) -> tuple[Message, ...]:
        """The conversation behind a prompt id."""
        return tuple(json.loads(self.prepared[int(prompt_id)]["messages"]))

    def reference(self, prompt_id: int) -> dict[str, Any] | None:
        """What the data file says for judging answers to this prompt."""
        text = self.prepared[int(prompt_id)]["reference"]
        return json.loads(text) if text else None

    @property
    def _slots(self) -> int:
        return self.batch_size // self.group_size

    def _slice(self, packs: list[np.ndarray]) -> list[np.ndarray]:
        return packs  # a group may lie on two hosts: rows are sliced, not prompts

    def _build(self, packs: Sequence[np.ndarray]) -> Prompts:
        ids = np.array([int(pack_[0]) if len(pack_) else -1 for pack_ in packs], np.int32)
        earlier = np.array([(ids[:i] == id_).sum() if id_ >= 0 else 0 for i, id_ in enumerate(ids)], np.int32)
        group = np.arange(self.group_size, dtype=np.int32)
        samples = np.where(ids[:, None] >= 0, earlier[:, None] * self.group_size + group, 0).astype(np.int32).reshape(-1)
        mine = self._mine(self.batch_size)
        prompt_ids = np.repeat(ids, self.group_size)[mine]
        tokens, positions, segments = _left_padded(
            [self.prepared[int(i)]["tokens"] if i >= 0 else EMPTY for i in prompt_ids], self.prompt_length, self.pad_id
        )
        groups = np.repeat(np.arange(len(ids), dtype=np.int32), self.group_size)[mine]
        leaves: dict[str, Any] = dict(
            tokens=tokens, positions=positions, segment_ids=segments, prompt_ids=prompt_ids, sample_ids=samples[mine], group_ids=groups
        )
        return Prompts(**leaves)


def head_slots(prepared: Prepared, max_length: int) -> int | None:
    """R: the most head positions of any row, rounded up to a multiple of 16; None, meaning everywhere, when that reaches T.

    Args:
      prepared: the rows.
      max_length: T.
    """
    slots = -(-int(prepared.head_lengths.max()) // 16) * 16
    return slots if slots < max_length else None


def segment(row: Row) -> Segment:
    """A row's tokens and loss mask, and its reference's log-probs if it has them."""
    return row["tokens"], row["loss_mask"], *([row["ref_logps"]] if "ref_logps" in row else [])


def right_padded(rows: Sequence[Sequence[Segment]], length: int, slots: int | None, pad_id: int, referenced: bool = False) -> Sequences:
    """Rows [B, T] of any number of segments each, padded on the right.

    Args:
      rows: B lists of segments; empty for a filler row.
      length: T.
      slots: R of `loss_positions`; None = no such leaf.
      pad_id: the token written on padding.
      referenced: whether the segments come with the reference's log-probs.
    """
    tokens = np.full((len(rows), length), pad_id, np.int32)
    positions, segments = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    mask, ref_logps = np.zeros((len(rows), length), bool), np.zeros((len(rows), length), np.float32)
    heads = None if slots is None else np.zeros((len(rows), slots), np.int32)
    for i, row in enumerate(rows):
        at = 0
        for number, (row_tokens, row_mask, *cached) in enumerate(row, start=1):
            here = slice(at, at + len(row_tokens))
            tokens[i, here], mask[i, here], segments[i, here] = row_tokens, row_mask, number
            if referenced:
                ref_logps[i, here] = cached[0]
            positions[i, here] = np.arange(len(row_tokens))
            at = here.stop
        if heads is not None and at:
            visited = np.flatnonzero(mask[i] | (np.arange(length) == at - 1))  # the last token is where a reward model reads
            heads[i, : len(visited)] = visited
    leaves: dict[str, Any] = dict(tokens=tokens, positions=positions, segment_ids=segments, loss_mask=mask, loss_positions=heads)
    return Sequences(**leaves, ref_logps=ref_logps if referenced else None)  # type: ignore[arg-type]


def _left_padded(rows: Sequence[np.ndarray], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), length), pad_id, np.int32)
    positions, segments = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        start = length - len(row)
        tokens[i, start:], positions[i, start:], segments[i, start:] = row, np.arange(len(row)), 1
    return tokens, positions, segments
