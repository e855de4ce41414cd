"""From a directory's tensors to a parameter tree, by a family's table: every leaf is `Lazy`, every misfit is in one error.

Expected shapes come from our parameters' shapes, sent through the table backwards; only headers have been read then. A checkpoint of the plain model
(transformers' `LlamaModel`) lacks the first part of its names (`model.`), which is accepted where all of them lack it. Where embeddings are tied and
the file has an output matrix all the same, it must equal the embedding to the bit: one of the two would otherwise be dropped in silence.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from flax import traverse_util

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf import directory as hf
from rlhf_jax.models.hf.rows import EMBEDDING, LM_HEAD, SCORE, SCORE_HEAD, VALUE_HEAD, Placement, Row, Shape, expand
from rlhf_jax.models.hf.safetensors import FLOATS, Tensor
from rlhf_jax.models.lazy import Lazy, common_dtype
from rlhf_jax.types import PyTree


def read_params(
    source: hf.Directory, rows: Sequence[Row], config: ModelConfig, abstract: PyTree, *, ignored: Sequence[str] = (),
    renamed: Sequence[tuple[str, str]] = (),
) -> PyTree:
    """The canonical parameter tree of a directory; nothing but headers is read, except for a tied output matrix.

    Args:
      source: the opened directory.
      rows: the family's table.
      config: the network.
      abstract: its canonical tree of ShapeDtypeStructs, of which only the shapes matter.
      ignored: regular expressions of whole names of tensors that hold nothing of the model's.
      renamed: (regular expression, replacement) pairs from other names that the family's checkpoints use to the table's.

    Returns:
      The tree of `abstract` with a `Lazy` at each leaf, in the dtype of the file.

    Raises:
      UserError: tensors are missing, superfluous, misshaped or not floating-point; all of them are listed.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items()}
    own = {path: shape for path, shape in shapes.items() if path.startswith(f"{VALUE_HEAD}/")}
    names = _Names(rows, renamed, source.tensors)
    placements = expand(rows, config, shapes.keys() - own.keys())
    fit = _Fit(source, names, config, shapes, names.problems)
    params = {path: leaf for placement in placements for path, leaf in fit.leaves(placement)} | fit.value_head(own)
    if homeless := shapes.keys() - own.keys() - {path for placement in placements for path in placement.ours}:
        raise ValueError(f"the table of family {config.family!r} has no row for {', '.join(sorted(homeless))}")
    fit.rest(rows, {name for placement in placements for name in placement.theirs}, ignored)
    if fit.problems:
        raise UserError(
            f"{source}: {len(fit.problems)} of its tensors do not fit the {config.family} model of its {hf.CONFIG}: {'; '.join(fit.problems)}; "
            f"check that {hf.CONFIG} belongs to these weights, or save the model again with transformers"
        )
    return traverse_util.unflatten_dict(params, sep="/")


class _Names:
    """Their tensors under the table's names, whatever the file calls them."""

    def __init__(self, rows: Sequence[Row], renamed: Sequence[tuple[str, str]], tensors: Mapping[str, Tensor]) -> None:
        known = {name: _renamed(name, renamed) for name in tensors}
        base, dot, _ = next((row.theirs for row in rows if row.ours == (EMBEDDING,)), "").partition(".")
        self.prefix = base + dot if dot and not any(name.startswith(base + dot) for name in known.values()) else ""
        heads = {row.theirs for row in (*rows, SCORE) if not row.theirs.startswith(self.prefix)}
        self.tensors: dict[str, Tensor] = {}
        self.problems: list[str] = []
        for given, name in known.items():
            name = name if name in heads else self.prefix + name
            if name in self.tensors:
                self.problems.append(f"{self.tensors[name].name} and {given} are the same parameter")
            self.tensors[name] = tensors[given]

    def given(self, name: str) -> str:
        """What the file calls, or would call, the table's `name`."""
        return self.tensors[name].name if name in self.tensors else name.removeprefix(self.prefix)


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


@dataclasses.dataclass
class _Fit:
    """The comparison of a directory with a network, and all that was found wrong."""

    source: hf.Directory
    names: _Names
    config: ModelConfig
    shapes: Mapping[str, Shape]
    problems: list[str]

    def leaves(self, placement: Placement) -> Iterator[tuple[str, Lazy]]:
        """Our parameters in some of their tensors; nothing where one of these is at fault."""
        expected = placement.shape(self.shapes, self.config)
        found = [tensor for name in placement.theirs if (tensor := self._checked(name, expected, placement)) is not None]
        if len(found) < len(placement.theirs):
            return
        dtype = common_dtype([tensor.dtype for tensor in found])
        for index, path in enumerate(placement.ours):
            part = self.shapes[path][1:] if placement.per_expert else self.shapes[path]
            read = [functools.partial(_part, tensor, placement.row, index, part, self.config) for tensor in found]
            pieces = tuple(((e,), one) for e, one in enumerate(read)) if placement.per_expert else (((), read[0]),)
            yield path, Lazy(self.shapes[path], dtype, pieces)

    def _checked(self, name: str, expected: Shape, placement: Placement) -> Tensor | None:
        """One tensor of theirs, or None and a problem noted."""
        tensor, given = self.names.tensors.get(name), self.names.given(name)
        if tensor is None:
            hint = f" (and {hf.CONFIG} does not tie it to the embedding)" if placement.ours == (LM_HEAD,) else ""
            self.problems.append(f"{given} is missing{hint}")
        elif placement.ours == (SCORE_HEAD,) and tensor.shape[:1] != expected[:1]:
            self.problems.append(f"{given} has shape {list(tensor.shape)}, a row per label, and a reward model has one (num_labels = 1)")
        else:
            return self._plain(tensor, expected, given)
        return None

    def _plain(self, tensor: Tensor, expected: Shape, given: str) -> Tensor | None:
        wrong = [f"has shape {list(tensor.shape)} and not {list(expected)}"] if tensor.shape != expected else []
        wrong += [f"is {tensor.kind} and none of {', '.join(FLOATS)}"] if not tensor.readable else []
        if wrong:
            self.problems.append(f"{given} {' and '.join(wrong)}")
        return None if wrong else tensor

    def value_head(self, own: Mapping[str, Shape]) -> dict[str, Lazy]:
        """The value head's parameters, from the file of their own."""
        found = {}
        for path, shape in own.items():
            name = path.rpartition("/")[2]
            tensor = (self.source.value_head or {}).get(name)
            if tensor is None:
                self.problems.append(f"{name} of {hf.VALUE_HEAD} is missing")
            elif (sound := self._plain(tensor, shape, f"{name} of {hf.VALUE_HEAD}")) is not None:
                found[path] = Lazy(shape, sound.dtype, (((), sound.read),))
        strangers = set(self.source.value_head or {}) - {path.rpartition("/")[2] for path in own} if own else set()
        self.problems += [f"{name} of {hf.VALUE_HEAD} is not a parameter of the model" for name in sorted(strangers)]
        return found

    def rest(self, rows: Sequence[Row], used: set[str], ignored: Sequence[str]) -> None:
        """Notes every tensor that no parameter of ours was read from, but for those that are ignored and a tied copy of the embedding."""
        by_ours = {row.ours: row.theirs for row in rows}
        head, embedding = by_ours.get((LM_HEAD,)), by_ours.get((EMBEDDING,))
        for name, tensor in self.names.tensors.items():
            given = self.names.given(name)
            if name in used or any(re.fullmatch(pattern, name) or re.fullmatch(pattern, given) for pattern in ignored):
                continue
            if name != head or not self.config.tied:
                self.problems.append(f"{given} is not a parameter of the model")
            elif embedding in self.names.tensors and not _equal(tensor, self.names.tensors[embedding]):
                self.problems.append(f"{given} differs from {self.names.given(embedding)}, to which {hf.CONFIG} ties it (tie_word_embeddings)")


def _part(tensor: Tensor, row: Row, index: int, shape: Shape, config: ModelConfig) -> np.ndarray:
    """Our parameter `index` of a tensor. A slice is copied, so that the rest of a fused tensor is not kept with it."""
    whole = tensor.read()
    part = row.split(whole, config)[index]
    if part.shape != shape:
        raise ValueError(f"the row of {row.theirs!r} splits {whole.shape} into {part.shape} where {row.ours[index]} is {shape}")
    return part.copy() if part.nbytes < whole.nbytes else part


def _equal(one: Tensor, other: Tensor) -> bool:
    return (one.kind, one.shape) == (other.kind, other.shape) and all(a == b for a, b in zip(one.blocks(), other.blocks()))
