"""Logical axes → shardings, and the one place that jits with a mesh and donation.

A table says which mesh axes carry which logical axis; which one, the mesh's axes say, which config.mesh.rules names (distributed.make_mesh):
- "tensor": parameters over `fsdp`, `tensor` and (experts) `expert`, rows over `data`, `fsdp` and `expert`. Plain data parallelism (parameters whole
  on every device), FSDP alone and tensor parallelism alone are shapes of this mesh: all devices on `data`, on `fsdp`, on `tensor`.
- "fsdp2d": the same parameters, and so the same memory, but rows over all axes: what "tensor" computes in parts, every device computes whole for its
  own rows, from kernels that are gathered along two short axes in place of one long one.
In both the slots of activations lie over `sequence`. Optimizer state follows its parameter. A batch is placed by rows: its integers are little beside
the activations, and a device takes those of its slots. Nothing below this file knows a mesh.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError
from rlhf_jax.ops.partition import SECOND, MeshAxes, axis_rules
from rlhf_jax.types import PyTree

RULES: dict[str, MeshAxes] = {
    "batch": ("data", "fsdp", "expert"),
    "length": "sequence",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
    "expert": "expert",
    # Of activations where an array that is split over `fsdp` is met as it lies, in the place of being gathered:
    "beside_fsdp": ("data", "expert"),  # rows
    "vocab_fsdp": ("tensor", "fsdp"),
}
_SECOND: dict[str, MeshAxes] = {**{name: SECOND if axes == "tensor" else axes for name, axes in RULES.items()}, "vocab_fsdp": (SECOND, "fsdp")}
_BATCH: MeshAxes = ("data", "fsdp", "expert", SECOND)
_WHOLE = {name: None if axes == SECOND else axes for name, axes in _SECOND.items()}  # an axis that splits rows splits nothing else of an activation


def rules(mesh: Mesh, *, parameters: bool = False) -> Mapping[str, MeshAxes]:
    """What the logical axes mean on this mesh, of activations or of parameters.

    Args:
      mesh: from distributed.make_mesh.
      parameters: which of the two.
    """
    if SECOND not in mesh.axis_names:
        return RULES
    return _SECOND if parameters else {**_WHOLE, "batch": _BATCH}


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays that lead with B."""
    return NamedSharding(mesh, PartitionSpec(rules(mesh)["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def placed(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape of an array on its sharding; tracing with it serves the call with the array itself."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where, weak_type=getattr(leaf, "weak_type", False))


def row_devices(mesh: Mesh) -> int:
    """Over how many devices rows are split; batch sizes are multiples of it."""
    return math.prod(mesh.shape[axis] for axis in rules(mesh)["batch"] or ())


def host_rows(mesh: Mesh, host: int | None = None) -> tuple[tuple[int, ...], int]:
    """(blocks, count): of the batch's rows in `count` equal blocks, those that the devices of a host hold. Hosts may hold the same ones, where an
    axis that does not split rows lies across them.

    Args:
      mesh: from distributed.make_mesh.
      host: its index; None = this process.
    """
    host, count = jax.process_index() if host is None else host, row_devices(mesh)
    index: Any = row_sharding(mesh).devices_indices_map((count,))
    return tuple(sorted({rows[0].start or 0 for device, rows in index.items() if device.process_index == host})), count


def row_numbers(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of a batch's rows are this host's, in order.

    Args:
      mesh: from distributed.make_mesh.
      rows: B.
    """
    blocks, count = host_rows(mesh)
    return np.arange(rows).reshape(count, rows // count)[list(blocks)].reshape(-1)


def global_shapes(batch: PyTree, mesh: Mesh) -> PyTree:
    """This host's rows of a batch as the shapes of the global one, on its devices.

    Args:
      batch: leaves [B_host, …].
      mesh: from distributed.make_mesh.
    """
    (blocks, count), where = host_rows(mesh), row_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] * count // len(blocks), *x.shape[1:]), x.dtype, sharding=where), batch)


def row_axes(mesh: Mesh) -> str:
    """The axes that rows are split over, as the config calls them, for messages."""
    return " × ".join("tensor" if axis == SECOND else axis for axis in rules(mesh)["batch"] or ())


def parameter_shardings(mesh: Mesh, axes: PyTree, shapes: PyTree) -> PyTree:
    """A NamedSharding per parameter.

    Args:
      mesh: from distributed.make_mesh.
      axes: tuples of logical axis names (transformer.logical_axes), the tree of `shapes`.
      shapes: ShapeDtypeStructs or arrays.

    Raises:
      UserError: a mesh axis does not divide the dimension that it should split, a vocabulary apart, which is left whole then.
    """

    table: Any = rules(mesh, parameters=True)

    def one(path: Any, shape: Any, names: tuple[str | None, ...]) -> NamedSharding:
        spec = [None if name is None else table[name] for name in names]
        for i, (size, name, axis) in enumerate(zip(shape.shape, names, spec, strict=True)):
            if name == "vocab" and size % mesh.shape[axis]:  # a checkpoint's odd vocabulary is no mistake of the user's
                logging.log_first_n(logging.WARNING, "the %d entries of the vocabulary are not split over the %d devices of the mesh's axis %s", 1,
                                    size, mesh.shape[axis], axis)
                spec[i] = None
        for size, name, axis in zip(shape.shape, names, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"config.mesh.{'tensor' if axis == SECOND else axis} = {mesh.shape[axis]} does not divide the {size} of axis {name!r} in "
                    f"{jax.tree_util.keystr(path)}: choose a divisor, or change the model's size"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    flat_axes = jax.tree.leaves(axes, is_leaf=is_axes)
    paths, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    return jax.tree.unflatten(treedef, [one(path, shape, names) for (path, shape), names in zip(paths, flat_axes, strict=True)])


def place(leaf: Any, where: NamedSharding, dtype: Any) -> jax.Array:
    """A parameter on its shards; one that is not read yet (models.lazy) comes piece by piece, so that no more than one piece lies on the host.

    Args:
      leaf: a NumPy array or a `Lazy`.
      where: its sharding.
      dtype: of the result.
    """
    pieces = getattr(leaf, "pieces", None)
    if pieces is None or (len(pieces) == 1 and pieces[0][0] == ()):
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, where, lambda index: np.ascontiguousarray(whole[index]).astype(dtype, copy=False))
    depth = len(pieces[0][0])
    part = NamedSharding(where.mesh, PartitionSpec(*tuple(where.spec)[depth:]))
    array = _zeros(tuple(leaf.shape), jnp.dtype(dtype), where)()
    for at, read in pieces:  # one after the other: pieces that are read ahead would pile up on the host
        array = jax.block_until_ready(_fill(where)(array, place(read(), part, dtype), tuple(np.int32(i) for i in at)))
    return array


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)


@functools.cache
def _fill(where: NamedSharding) -> Any:
    """Writes one piece into its place along the leading axes; in place, since the array is donated."""

    def fill(array: jax.Array, piece: jax.Array, at: tuple[Any, ...]) -> jax.Array:
        starts = (*at, *(0,) * piece.ndim)
        return jax.lax.dynamic_update_slice(array, piece.reshape((1,) * len(at) + piece.shape), starts)

    return jax.jit(fill, donate_argnums=0, out_shardings=where)


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
        with axis_rules(mesh, rules(mesh)):
            return fn(*args)

    options = {} if out_shardings is None else {"out_shardings": out_shardings}
    return jax.jit(traced, donate_argnums=donate, static_argnums=static, **options)
