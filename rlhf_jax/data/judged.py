"""Batches of responses that are judged one by one: good or bad, by a score, or step by step.

Like those of `batches.py`, index functions with NumPy leaves. KTO estimates a KL on mismatched pairs, each prompt with another row's
response; a batch's pairs are a function of the batch (law 7), so any host makes its own rows of them.
See: Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.1. Deviation: prompt and foreign response meet as tokens, as in TRL; a tokenizer
might merge characters across that border, where the templates that ship here have a control token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.batches import PaddedData, Segment, segment
from rlhf_jax.data.encode import Row
from rlhf_jax.types import Labelled, Unpaired


class FeedbackData(PaddedData[Unpaired]):
    """Responses said to be good or bad, [B, T], and for each row its prompt with the response of the next real row of the global batch.

    The last real row takes the first one's response. A global batch with one real row (batch_size = 1, or the end of an evaluation) has
    only its own: KTO's baseline is then that row's own log-ratio, where that is positive. The foreign response is cut at T.
    """

    def _slice(self, packs: list[np.ndarray]) -> list[np.ndarray]:
        return packs  # the response beside a row's prompt may be another host's

    def _build(self, packs: Sequence[np.ndarray]) -> Unpaired:
        ids = [int(pack_[0]) for pack_ in packs if len(pack_)]  # real rows come first
        mine = self._mine(len(packs))
        rows = self._rows([packs[i] for i in mine])
        others = [self.prepared[ids[(i + 1) % len(ids)]] if i < len(ids) else None for i in mine]
        own = [[segment(row)] if row else [] for row in rows]
        foreign = [[self._mismatched(row, other)] if row and other else [] for row, other in zip(rows, others)]
        desirable: Any = np.array([bool(row["desirable"]) if row else False for row in rows])
        return Unpaired(seqs=self._padded(own), kl_seqs=self._padded(foreign), desirable=desirable)

    def _mismatched(self, row: Row, other: Row) -> Segment:
        """`row`'s prompt, then what `other` holds from its response on."""
        prompt, begin = row["tokens"][: row["loss_mask"].argmax()], int(other["loss_mask"].argmax())
        tokens = np.concatenate([prompt, other["tokens"][begin:]])
        mask = np.concatenate([np.zeros(len(prompt), bool), other["loss_mask"][begin:]])
        return tokens[: self.max_length], mask[: self.max_length]


class LabelledData(PaddedData[Labelled]):
    """Responses with a score at the last token, or with a verdict of 0 or 1 at the end of each step, [B, T]."""

    def _build(self, packs: Sequence[np.ndarray]) -> Labelled:
        rows = self._rows(packs)
        targets: Any = np.zeros((len(rows), self.max_length), np.float32)
        weights: Any = np.zeros_like(targets)
        for i, row in enumerate(rows):
            if row:
                at, value = (row["steps"], row["labels"]) if "steps" in row else (len(row["tokens"]) - 1, row["score"])
                targets[i, at], weights[i, at] = value, 1.0
        seqs = self._padded([[segment(row)] if row else [] for row in rows])
        return Labelled(seqs=seqs, targets=targets, weights=weights)
