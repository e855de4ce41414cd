"""Which platform a program is for, and which layouts each takes: every choice that a measurement made is here, and what stands for the others.

A backend that is not named was not measured yet: it scans layers, attends by dots and draws by Gumbel noise.
"""

from __future__ import annotations

import jax

from rlhf_jax.ops import partition

UNROLLING = ("cpu",)  # decode layer by layer; a TPU's layer scan with the cache along compiles to the least memory (models/networks.py)
JOINED_BELOW = 4 * 2**20  # bytes: kernels of one input and no larger are joined for decoding on an UNROLLING backend: a call costs more than they do
ELEMENTWISE = ("cpu",)  # one query per row attends to a cache by sums of products; elsewhere by dots (models/attention.py)
CAUSAL = {"cpu": "stairs", "tpu": "splash", "gpu": "cudnn"}  # how the queries of a whole row attend (models/causal.py); elsewhere in blocks
LONG, STAIR = 128, 64  # on a CPU: slots from which a row attends in steps, and queries of a step (experiments/benchmarks/attention.py)
INVERTING = ("cpu",)  # large vocabularies are drawn by inverting the distribution function (ops/categorical.py)


def platform() -> str:
    """"cpu", "gpu" or "tpu": where the program being traced will run. The devices of `axis_rules` say so; they may be those of a topology that is
    compiled for from a machine that has none. Outside, JAX's default."""
    mesh = partition.mesh()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
