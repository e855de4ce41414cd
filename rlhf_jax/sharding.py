"""Logical axes → shardings, and the one place that jits with a mesh and donation.

One table says which mesh axes carry which logical axis. Parameters are sharded over `fsdp` and `tensor`, rows over `data` and `fsdp`;
optimizer state follows its parameter. Nothing below this file knows a mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError
from rlhf_jax.ops.partition import MeshAxes, axis_rules
from rlhf_jax.types import PyTree

RULES: dict[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
}


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays that lead with B."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def placed(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape of an array on its sharding; tracing with it serves the call with the array itself."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where, weak_type=getattr(leaf, "weak_type", False))


def row_devices(mesh: Mesh) -> int:
    """Over how many devices rows are split; batch sizes are multiples of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def parameter_shardings(mesh: Mesh, axes: PyTree, shapes: PyTree) -> PyTree:
    """A NamedSharding per parameter.

    Args:
      mesh: from distributed.make_mesh.
      axes: tuples of logical axis names (transformer.logical_axes), the tree of `shapes`.
      shapes: ShapeDtypeStructs or arrays.

    Raises:
      UserError: a mesh axis does not divide the dimension that it should split.
    """

    def one(path: Any, shape: Any, names: tuple[str | None, ...]) -> NamedSharding:
        spec = [None if name is None else RULES[name] for name in names]
        for size, name, axis in zip(shape.shape, names, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"config.mesh.{axis} = {mesh.shape[axis]} does not divide the {size} of axis {name!r} in "
                    f"{jax.tree_util.keystr(path)}: choose a divisor, or change the model's size"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    flat_axes = jax.tree.leaves(axes, is_leaf=is_axes)
    paths, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    return jax.tree.unflatten(treedef, [one(path, shape, names) for (path, shape), names in zip(paths, flat_axes, strict=True)])


def jit(fn: Callable[..., Any], mesh: Mesh, *, out_shardings: Any = None, donate: tuple[int, ...] = (), static: tuple[int, ...] = ()
        ) -> Any:
    """`jax.jit` under this mesh's axis rules.

    Args:
      fn: a pure function.
      mesh: what the logical constraints inside refer to.
      out_shardings: as in jax.jit; None lets the compiler choose.
      donate: positions of arguments whose buffers the results may take over.
      static: positions of static arguments.
    """

    @functools.wraps(fn)
    def traced(*args: Any) -> Any:
        with axis_rules(mesh, RULES):
            return fn(*args)

    options = {} if out_shardings is None else {"out_shardings": out_shardings}
    return jax.jit(traced, donate_argnums=donate, static_argnums=static, **options)
