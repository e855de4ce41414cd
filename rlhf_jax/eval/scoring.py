"""Token rows scored by a saved network: the policy's log-prob of every token, or a reward model's score, as training computes them.

Rows are taken a window at a time, longest first, and padded on the right to a power of two, so that a file of any lengths compiles a handful of
programs; results come back in the order of the rows. Padding is never attended, so that a row's numbers do not depend on its neighbours.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlhf_jax import distributed, sharding
from rlhf_jax.data.batches import right_padded
from rlhf_jax.data.mixed import Item
from rlhf_jax.errors import UserError
from rlhf_jax.eval.models import Policy, RewardModel
from rlhf_jax.saved import Source

SHORTEST = 16  # tokens of the smallest padded length
WINDOW = 64  # batches whose rows are sorted together
LOGITS = 2**27  # entries of logits that exist at once; 512 MiB in float32
EVERY = 10.0  # seconds between two reports of progress


def lengths(context: int) -> tuple[int, ...]:
    """The padded lengths, tokens: powers of two up to the context, and the context itself.

    Args:
      context: tokens.
    """
    sizes = [SHORTEST]
    while sizes[-1] * 2 < context:
        sizes.append(sizes[-1] * 2)
    return tuple(size for size in sizes if size < context) + (context,)


class Scorer:
    """A saved network that reads rows.

    Args:
      source: the network.
      key: the flag that named it, for messages.
      batch_tokens: tokens of a batch, padding included; at least one row goes.
      temperature: divides a policy's logits.
      mesh: None takes one device.
    """

    def __init__(self, source: Source, key: str, *, batch_tokens: int, temperature: float = 1.0, mesh: Mesh | None = None) -> None:
        self.lengths, self.batch_tokens, self.temperature = lengths(source.config.context), batch_tokens, temperature
        self.mesh = mesh or distributed.make_mesh({}, devices=1)
        self._devices = sharding.row_devices(self.mesh)
        self.rewards = source.network == "reward"
        self._model: Any = (RewardModel if self.rewards else Policy)(source, key, self.mesh)

    def rows(self, length: int) -> int:
        """How many rows of a padded length make a batch: a multiple of the devices that rows are split over."""
        return max(self.batch_tokens // length // self._devices, 1) * self._devices

    def score(self, items: Sequence[Item], finished: Callable[[int], None] = lambda rows: None) -> list[np.ndarray]:
        """[n] log-probs per row, entry 0 zero, nats; of a reward model [] scores. In the order of the rows.

        Args:
          items: rows no longer than the context.
          finished: is told how many more rows are done.
        """
        order = sorted(range(len(items)), key=lambda i: -len(items[i].tokens))
        found: list[np.ndarray] = [np.zeros(0)] * len(items)
        begin = 0
        while begin < len(order):
            length = next(size for size in self.lengths if size >= len(items[order[begin]].tokens))
            chosen = order[begin : begin + self.rows(length)]
            for i, values in zip(chosen, self._batch([items[i] for i in chosen], length)):
                found[i] = values
            begin += len(chosen)
            finished(len(chosen))
        return found

    def _sized(self, length: int) -> Any:
        """The network with as many positions' logits at once as fit."""
        model, most = copy.copy(self._model), max(LOGITS // (self.rows(length) * self._model.config.vocab_size), 1)
        model.config = dataclasses.replace(model.config, logits_chunk=min(model.config.logits_chunk or most, most))
        return model

    def _batch(self, items: list[Item], length: int) -> Iterator[np.ndarray]:
        """One batch's results. The last one of a window is filled up to a power of two of rows, not to the whole: a small file stays cheap."""
        rows, whole = self._devices, self.rows(length)
        while rows < len(items):
            rows = min(rows * 2, whole)
        filled = [[(item.tokens, np.arange(len(item.tokens)) > 0)] for item in items] + [[]] * (rows - len(items))
        seqs = right_padded(filled, length, None, 0)
        model = self._sized(length)
        values = np.asarray(model.row_scores(seqs) if self.rewards else model.logps(seqs, temperature=self.temperature), np.float32)
        for item, row in zip(items, values):
            mine = row if self.rewards else row[: len(item.tokens)]
            if not np.isfinite(mine).all():
                raise UserError(f"{item.place} has a {'score' if self.rewards else 'log-prob'} that is not finite: the network diverged, or "
                                "--dtype float32 is needed")
            yield mine


def windows(items: Sequence[Item], batch_tokens: int) -> Iterator[Sequence[Item]]:
    """Consecutive rows in portions whose results are kept in memory together.

    Args:
      items: rows.
      batch_tokens: tokens of a batch.
    """
    begin = total = 0
    for end, item in enumerate(items, start=1):
        total += len(item.tokens)
        if total >= WINDOW * batch_tokens or end == len(items):
            yield items[begin:end]
            begin, total = end, 0


class Progress:
    """Tells a person now and then how far a long file is.

    Args:
      total: rows.
      say: gets a line.
    """

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.done, self._say = total, 0, say
        self._start = self._last = time.monotonic()

    def __call__(self, rows: int) -> None:
        """`rows` more are done."""
        self.done += rows
        now = time.monotonic()
        if now - self._last >= EVERY and self.done < self.total:
            left = (now - self._start) / self.done * (self.total - self.done)
            self._say(f"{self.done} of {self.total} rows scored, about {left:.0f} s left")
            self._last = now
