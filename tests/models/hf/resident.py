"""How much memory loading takes beyond what it leaves behind: `python -m tests.models.hf.resident MODE FOLDER`, which prints bytes as JSON.

FOLDER holds what `checkpoint` wrote, 24 tensors of 16 MiB and a table of 48 MiB. It is read as a run does it: `read_params`, `layout`,
`sharding.place`. MODE: "layers" (unrolled, one device), "scan" (the layers' tensors stacked), "sharded" (as scan, over two devices). The peak is the
kernel's own count.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import distributed, sharding
from rlhf_jax.models import layout
from rlhf_jax.models.hf.directory import open_directory
from rlhf_jax.models.hf.rows import same, transposed
from rlhf_jax.models.hf.safetensors import Output, write
from rlhf_jax.models.hf.tensors import read_params
from rlhf_jax.models.lazy import Lazy
from tests.models.hf.invented import CONFIG

LAYERS, SIDE, VOCABULARY = 24, 2048, 6144  # float32: 16 MiB a layer, 48 MiB the table
ROWS = (same("model.embed.weight", "ends/embedding"), transposed("model.layers.{i}.out.weight", "layers/{i}/output/kernel"))


def status(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def checkpoint(folder: Path) -> None:
    """Writes the model, a tensor at a time."""
    fill = lambda number, *shape: lambda: np.full(shape, number, np.float32)  # noqa: E731
    outputs = [Output(f"model.layers.{i}.out.weight", np.dtype(np.float32), (SIDE, SIDE), fill(i, SIDE, SIDE)) for i in range(LAYERS)]
    outputs.append(Output("model.embed.weight", np.dtype(np.float32), (VOCABULARY, SIDE), fill(LAYERS, VOCABULARY, SIDE)))
    write(folder / "model.safetensors", outputs)
    (folder / "config.json").write_text('{"model_type": "invented"}')


def main(mode: str, folder: Path) -> None:
    """Loads and measures."""
    config = dataclasses.replace(CONFIG, layers=LAYERS, scan_layers=mode != "layers", experts=0, dense=(False,))
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    abstract = {"ends": {"embedding": shape(VOCABULARY, SIDE)}, "layers": {str(i): {"output": {"kernel": shape(SIDE, SIDE)}} for i in range(LAYERS)}}
    mesh = distributed.make_mesh({name: 1 for name in distributed.AXES} | {"fsdp": 2 if mode == "sharded" else 1}, 2 if mode == "sharded" else 1)
    where = lambda leaf: NamedSharding(mesh, PartitionSpec(*(None,) * (len(leaf.shape) - 1), "fsdp"))  # noqa: E731
    small = np.ones((2, 2), np.float32)  # what jax and its compiler take for themselves, however large the model
    for leaf in (small, Lazy.stack([small, small])):
        jax.block_until_ready(sharding.place(leaf, where(leaf), np.float32))

    baseline = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    loaded = layout.to_runtime(read_params(open_directory(folder, "config.init_from"), ROWS, config, abstract), config.unit)
    params = jax.tree.map(lambda leaf: jax.block_until_ready(sharding.place(leaf, where(leaf), np.float32)), loaded)
    peak = status("VmHWM")

    resident = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sorted({float(leaf[0, 0]) for leaf in jax.tree.leaves(layout.to_canonical(params))}) == list(range(LAYERS + 1))
    print(json.dumps({"baseline": baseline, "peak": peak, "resident": resident, "largest": 4 * VOCABULARY * SIDE}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
