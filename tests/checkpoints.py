"""Small saved trees for the tests of checkpoints."""

import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.checkpoint import Checkpointer


def mesh(devices: int) -> Mesh:
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def params(seed: int = 0) -> dict:
    key = jax.random.key(seed)
    return {"policy": {"w": jax.random.normal(key, (64, 64)), "b": jnp.arange(8, dtype=jnp.bfloat16)}}


def abstract(tree, sharding=None):
    """Shapes and dtypes of `tree`; vectors and matrices on `sharding`, scalars replicated there."""

    def leaf(x):
        if sharding is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        spec = sharding.spec if x.ndim else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(sharding.mesh, spec))

    return jax.tree.map(leaf, tree)


def saved(directory, steps=(1,), every=1, keep=5) -> pathlib.Path:
    """Steps whose parameters are seeded with the step."""
    with Checkpointer(directory, every=every, keep=keep) as saver:
        for step in steps:
            assert saver.save(step, {"params": params(step), "rest": {"step": jnp.int32(step)}}, {"seed": step})
    return pathlib.Path(directory)


def restored(directory):
    with Checkpointer(directory, every=1, keep=5) as saver:
        return saver.restore_latest({"params": abstract(params())})


def data_files(step: pathlib.Path) -> list[pathlib.Path]:
    """Orbax keeps values in content-named files under `d/`, some of them superseded: damage reaches all."""
    files = [path for path in (step / "params").rglob("d/*") if path.is_file()]
    assert files
    return files


def flip_a_bit(step):
    """In the values, not in the B-tree nodes, which carry a CRC."""
    for path in (path for path in data_files(step) if path.stat().st_size > 4096):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
