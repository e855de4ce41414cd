"""The weight tables of the families: which tensor of a Hugging Face checkpoint holds which parameters of ours, and how it is laid out.

A row maps one tensor to one or several parameters (fused projections). `{i}` runs over layers and `{e}` over experts; where theirs has `{e}`, our
parameter has a leading axis of experts. A row whose parameters the network does not have (a bias that is off, a layer without experts) is left
out, so one table serves all sizes and options of a family.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from rlhf_jax.models.config import ModelConfig

Split = Callable[[np.ndarray, ModelConfig], Sequence[np.ndarray]]
Join = Callable[[Sequence[np.ndarray], ModelConfig], np.ndarray]
Shape = tuple[int, ...]

EMBEDDING, LM_HEAD, SCORE_HEAD = "ends/embedding", "ends/lm_head", "ends/score_head/kernel"  # paths of ours
VALUE_HEAD = "ends/value_head"


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of theirs and what it is here."""

    theirs: str  # e.g. "model.layers.{i}.self_attn.q_proj.weight"
    ours: tuple[str, ...]  # e.g. ("layers/{i}/query/kernel",)
    split: Split  # their tensor → our parameters, in the order of `ours`
    join: Join  # the inverse


def same(theirs: str, ours: str) -> Row:
    """Equal arrays: norms, biases, embedding tables."""
    return Row(theirs, (ours,), lambda tensor, _: (tensor,), lambda parts, _: parts[0])


def transposed(theirs: str, ours: str) -> Row:
    """torch.nn.Linear keeps [out, in], we [in, out]."""
    return Row(theirs, (ours,), lambda tensor, _: (tensor.T,), lambda parts, _: parts[0].T)


SCORE = transposed("score.weight", SCORE_HEAD)  # of every XForSequenceClassification: [labels, D]


@dataclasses.dataclass(frozen=True)
class Placement:
    """A row at one layer: these tensors of theirs hold these parameters of ours."""

    row: Row
    theirs: tuple[str, ...]  # one tensor, or one per expert
    ours: tuple[str, ...]
    per_expert: bool

    def shape(self, shapes: Mapping[str, Shape], config: ModelConfig) -> Shape:
        """The shape of each tensor of theirs.

        Args:
          shapes: of our parameters, by path.
          config: the network.
        """
        parts = tuple(shapes[path][1:] if self.per_expert else shapes[path] for path in self.ours)
        return _joined(self.row, parts, config)


@functools.lru_cache(maxsize=1024)
def _joined(row: Row, parts: tuple[Shape, ...], config: ModelConfig) -> Shape:
    # One byte stands for the whole of each part; only a fused row's `join` allocates, a byte per element.
    return row.join([np.broadcast_to(np.zeros((), np.int8), part) for part in parts], config).shape


def expand(rows: Sequence[Row], config: ModelConfig, params: Collection[str]) -> list[Placement]:
    """A table spelt out for one network, in the table's order, layer by layer within each run of rows that have `{i}`.

    Args:
      rows: the family's table. A reward model's `score.weight` need not be in it.
      config: the network.
      params: canonical paths of its parameters.

    Raises:
      ValueError: the table contradicts itself: two rows hold one parameter, or the network has only a part of what one row holds.
    """
    rows = rows if any(SCORE_HEAD in row.ours for row in rows) else (*rows, SCORE)
    placements: list[Placement] = []
    for layered, run in itertools.groupby(rows, lambda row: "{i}" in row.theirs):
        group = tuple(run)
        for layer in range(config.layers) if layered else (0,):
            placements += _at(group, layer, config, frozenset(params))
    held = collections.Counter(path for placement in placements for path in placement.ours)
    if twice := sorted(path for path, count in held.items() if count > 1):
        raise ValueError(f"several rows of family {config.family!r} hold {', '.join(twice)}")
    return placements


def _at(rows: Sequence[Row], layer: int, config: ModelConfig, params: Collection[str]) -> Iterator[Placement]:
    """The rows that the network has at one layer."""
    for row in rows:
        ours = tuple(path.replace("{i}", str(layer)) for path in row.ours)
        has = [path in params for path in ours]
        if any(has) and not all(has):
            raise ValueError(f"the row of {row.theirs!r} holds {', '.join(ours)}, of which the network has only a part")
        if not any(has):
            continue
        name = row.theirs.replace("{i}", str(layer))
        per_expert = "{e}" in name
        names = tuple(name.replace("{e}", str(e)) for e in range(config.experts)) if per_expert else (name,)
        yield Placement(row, names, ours, per_expert)

