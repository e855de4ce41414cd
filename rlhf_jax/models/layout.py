"""One saved layout with per-layer names, whatever the running one.

Canonical: `{"layers": {"0": …, "1": …}}`. Running with a layer scan: `{"layers": {"scan": …}}`, every leaf stacked on a leading axis.
The functions walk any pytree (a whole optimizer state) and convert each parameter tree that they find in it, so a checkpoint does not
depend on scan or unroll.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.types import PyTree

SCAN = "scan"


class Axes(tuple):
    """Logical axis names of one parameter; a leaf, unlike a plain tuple."""


def _is_network(node: Any) -> bool:
    return isinstance(node, dict) and "layers" in node


def _convert(tree: PyTree, layers: Any) -> PyTree:
    def visit(node: Any) -> Any:
        return {**node, "layers": layers(node["layers"])} if _is_network(node) else node

    return jax.tree.map(visit, tree, is_leaf=_is_network)


def to_runtime(tree: PyTree, scan: bool) -> PyTree:
    """From the canonical layout to the running one: stacked when layers are scanned.

    Args:
      tree: any pytree with canonical parameter trees in it.
      scan: whether the network runs a layer scan.
    """

    def stack(layers: dict[str, PyTree]) -> dict[str, PyTree]:
        if not scan or SCAN in layers:
            return layers
        ordered = [layers[str(i)] for i in range(len(layers))]
        return {SCAN: jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)}

    return _convert(tree, stack)


def to_canonical(tree: PyTree) -> PyTree:
    """From either running layout to the canonical one.

    Args:
      tree: any pytree with parameter trees in it.
    """

    def unstack(layers: dict[str, PyTree]) -> dict[str, PyTree]:
        leaves = jax.tree.leaves(layers.get(SCAN))
        if not leaves:  # unrolled, or an optimizer's state that masks every leaf of the layers
            return layers
        count = leaves[0].shape[0]
        return {str(i): jax.tree.map(lambda leaf: _layer(leaf, i), layers[SCAN]) for i in range(count)}  # noqa: B023

    return _convert(tree, unstack)


def _layer(leaf: Any, index: int) -> Any:
    """One layer of a stacked array; of an abstract one, its shape on its sharding without the stacked axis."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf[index]
    where = leaf.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)


def axes_to_runtime(axes: PyTree, scan: bool) -> PyTree:
    """`to_runtime` for a tree whose leaves are `Axes`: the stacked axis has no mesh axis of its own."""

    def stack(layers: dict[str, PyTree]) -> dict[str, PyTree]:
        if not scan:
            return layers
        return {SCAN: jax.tree.map(lambda names: Axes((None, *names)), layers["0"], is_leaf=lambda leaf: isinstance(leaf, Axes))}

    return {**axes, "layers": stack(axes["layers"])}
