"""One saved layout with per-layer names, whatever the running one.

Canonical: `{"layers": {"0": …, "1": …}}`. Running with a layer scan over units of two layers: `{"layers": {"scan": {"0of2": …, "1of2": …}, "8": …}}`,
every leaf of `scan` stacked over the repeats on a leading axis, and the layers that make no whole unit under their own names. The functions walk
any pytree (a whole optimizer state) and convert each parameter tree that they find in it, so a checkpoint does not depend on scan or unroll.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.models.adopt import DRAWN
from rlhf_jax.models.lazy import Lazy
from rlhf_jax.types import PyTree

SCAN, OF = "scan", "of"
JOINED = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}


class Axes(tuple):
    """Logical axis names of one parameter; a leaf, unlike a plain tuple."""


def _is_network(node: Any) -> bool:
    return isinstance(node, dict) and "layers" in node


def _convert(tree: PyTree, layers: Any) -> PyTree:
    def visit(node: Any) -> Any:
        return {**node, "layers": layers(node["layers"])} if _is_network(node) else node

    return jax.tree.map(visit, tree, is_leaf=_is_network)


def to_runtime(tree: PyTree, unit: int) -> PyTree:
    """From the canonical layout to the running one: stacked when layers are scanned. Leaves that are not read yet, or to be drawn, stay so.

    Args:
      tree: any pytree with canonical parameter trees in it, all of one network's layers.
      unit: ModelConfig.unit; 0 = unrolled.
    """
    return _convert(tree, lambda layers: _stacked(layers, unit))


def like(tree: PyTree, running: PyTree) -> PyTree:
    """`to_runtime`, each network in the layout that it has in `running`.

    Args:
      tree: a pytree with canonical parameter trees in it.
      running: the same pytree in the running layout, abstract or not.
    """
    nodes, treedef = jax.tree.flatten(tree, is_leaf=_is_network)
    models = jax.tree.leaves(running, is_leaf=_is_network)

    def one(node: Any, model: Any) -> Any:
        if not _is_network(node) or not _unit(model["layers"]) or SCAN in node["layers"]:
            return node
        layers, names = node["layers"], sorted((name for name in node["layers"] if name not in model["layers"]), key=int)
        scan = {name: [layers[i] for i in names if int(i) % _unit(model["layers"]) == int(name.split(OF)[0])] for name in model["layers"][SCAN]}
        rest = {name: layer for name, layer in layers.items() if name in model["layers"]}
        return {**node, "layers": {SCAN: {name: jax.tree.map(_stack, *same) for name, same in scan.items()}, **rest}}

    return jax.tree.unflatten(treedef, [one(node, model) for node, model in zip(nodes, models, strict=True)])


def _unit(layers: dict[str, PyTree]) -> int:
    """How many layers a scan repeats; 0 without one. Of partial trees too, which lack some of them."""
    return next((int(name.split(OF)[1]) for name in layers.get(SCAN, ())), 0)


def unit_names(unit: int) -> list[str]:
    """The keys below `scan`."""
    return [f"{kind}{OF}{unit}" for kind in range(unit)]


def _stacked(layers: dict[str, PyTree], unit: int) -> dict[str, PyTree]:
    if not unit or SCAN in layers:
        return layers
    whole = len(layers) - len(layers) % unit
    units = {name: [layers[str(i)] for i in range(kind, whole, unit)] for kind, name in enumerate(unit_names(unit))}
    rest = {str(i): layers[str(i)] for i in range(whole, len(layers))}
    return {SCAN: {kind: jax.tree.map(_stack, *same) for kind, same in units.items()}, **rest}


def _stack(*leaves: Any) -> Any:
    if all(leaf is DRAWN for leaf in leaves):  # adapters that no checkpoint holds
        return DRAWN
    if any(isinstance(leaf, Lazy) for leaf in leaves):
        return Lazy.stack(leaves)
    return np.stack(leaves) if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp.stack(leaves)


def to_canonical(tree: PyTree) -> PyTree:
    """From either running layout to the canonical one.

    Args:
      tree: any pytree with parameter trees in it.
    """

    def unstack(layers: dict[str, PyTree]) -> dict[str, PyTree]:
        leaves = jax.tree.leaves(layers.get(SCAN))
        if not leaves:  # unrolled, or an optimizer's state that masks every leaf of the layers
            return layers
        repeats, unit = leaves[0].shape[0], _unit(layers)
        scanned = {repeat * unit + int(kind.split(OF)[0]): jax.tree.map(lambda leaf: _layer(leaf, repeat), stacked)  # noqa: B023
                   for kind, stacked in layers[SCAN].items() for repeat in range(repeats)}
        return {**{str(i): scanned[i] for i in sorted(scanned)}, **{name: layer for name, layer in layers.items() if name != SCAN}}

    return _convert(tree, unstack)


def _layer(leaf: Any, index: int) -> Any:
    """One layer of a stacked array; of an abstract one, its shape on its sharding without the stacked axis."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf[index]
    where = leaf.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)


def joined(params: PyTree, limit: int) -> PyTree:
    """A network for decoding: kernels that read the same input side by side in one (JOINED), where none of them exceeds the limit.

    Args:
      params: canonical, without adapters or codes.
      limit: bytes of a kernel.
    """

    def join(layer: dict[str, PyTree]) -> dict[str, PyTree]:
        for name, parts in JOINED.items():
            if all(part in layer for part in parts) and max(layer[part]["kernel"].nbytes for part in parts) <= limit:
                side_by_side = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *(layer[part] for part in parts))
                layer = {**{key: value for key, value in layer.items() if key not in parts}, name: side_by_side}
        return layer

    return {**params, "layers": {number: join(layer) for number, layer in params["layers"].items()}}


def axes_to_runtime(axes: PyTree, unit: int) -> PyTree:
    """`to_runtime` for a tree whose leaves are `Axes`: the stacked axis has no mesh axis of its own."""

    def stack(*names: Axes) -> Axes:
        return Axes((None, *names[0]))

    def convert(layers: dict[str, PyTree]) -> dict[str, PyTree]:
        if not unit:
            return layers
        whole = len(layers) - len(layers) % unit
        is_axes = lambda leaf: isinstance(leaf, Axes)  # noqa: E731
        scan = {name: jax.tree.map(stack, layers[str(kind)], is_leaf=is_axes) for kind, name in enumerate(unit_names(unit))}
        return {SCAN: scan, **{str(i): layers[str(i)] for i in range(whole, len(layers))}}

    return {**axes, "layers": convert(axes["layers"])}
