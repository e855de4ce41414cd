"""Every built-in objective with real tiny networks, a batch of its type and its gradients: for the tests of sharding and of the step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import objectives
from rlhf_jax.models import Networks, NetworkSpec
from rlhf_jax.objectives import Objective
from rlhf_jax.train.step import fill_reference, gradients
from rlhf_jax.types import Comparisons, Labelled, PyTree, Sequences, Unpaired
from tests.models import tiny
from tests.objectives import tabular
from tests.objectives.settings import bound

NAMES = tuple(objectives.names())
# Of every type of batch and of normalisation, in CI; the other objectives' turn comes with the slow tests.
REPRESENTATIVE = ("sft", "reward", "dpo", "kto", "process_reward", "ppo", "grpo")
MODEL = tiny.config(vocab_size=16, scan_layers=True, outputs=("lm", "value"))
SCORER = tiny.config(vocab_size=16, scan_layers=True, outputs=("score",))
SCORERS = ("reward", "plackett_luce", "pointwise", "process_reward")  # objectives that train a reward model
OPTIMIZER = {"name": "adamw", "lr": 1e-2, "schedule": "constant", "warmup_steps": 0, "end_lr_ratio": 1.0, "b1": 0.9, "b2": 0.99, "eps": 1e-8,
             "muon_beta": 0.95, "weight_decay": 0.01, "clip_norm": 1.0, "ema_decay": 0.0, "moment_dtype": "float32"}


def networks(name: str) -> Networks:
    """The objective's networks: one that trains, a reference that differs from it, and a value head."""
    if name in SCORERS:
        return Networks({"reward": tiny.params(SCORER)}, {}, NetworkSpec(reward=SCORER))
    frozen = {"ref": tiny.params(MODEL, 7)} if bound(name).needs & {"reference", "teacher"} else {}
    return Networks({"policy": tiny.params(MODEL)}, frozen, NetworkSpec(policy=MODEL, temperature=0.9))


def batch(name: str, rows: int = 16, length: int = 10, seed: int = 0) -> Any:
    """A batch of the objective's type: ragged rows, a filler row, prompts that do not count."""
    rng, kind = np.random.default_rng(seed), bound(name).batch_type
    seqs = tiny.rows(rows, length, seed=seed, branches=2 if kind is Comparisons else 0, vocabulary=16)
    keep = jnp.asarray(np.arange(rows) != rows - 2).reshape(-1, *[1] * (seqs.tokens.ndim - 1))
    answer = jnp.asarray((rng.random(seqs.tokens.shape) < 0.7) & (np.arange(length) > 3))
    seqs = seqs.replace(segment_ids=seqs.segment_ids * keep, loss_mask=seqs.loss_mask & answer)
    if kind is Sequences:
        return seqs
    if kind is Comparisons:
        return Comparisons(seqs=seqs, margin=jnp.asarray(rng.random(rows), jnp.float32))
    if kind is Unpaired:
        return Unpaired(seqs=seqs, kl_seqs=jax.tree.map(lambda x: jnp.roll(x, 1, 0), seqs), desirable=jnp.asarray(rng.random(rows) < 0.5))
    if kind is Labelled:
        targets = jnp.asarray(rng.integers(0, 2, (rows, length)), jnp.float32)
        return Labelled(seqs=seqs, targets=targets, weights=jnp.asarray(rng.random((rows, length)) < 0.3, jnp.float32))
    scores = jnp.asarray(rng.normal(size=rows), jnp.float32)
    ptx = tiny.rows(rows, length + 2, seed=seed + 1, vocabulary=16) if "ptx" in bound(name).needs else None
    return tabular.scored(seqs, scores, group=4).replace(truncated=jnp.arange(rows) % 5 == 1, ptx=ptx)


def moved(params: PyTree, size: float = 0.02) -> PyTree:
    """Other parameters nearby, so that a policy's ratios to the old one are not 1."""
    return jax.tree.map(lambda x: x + size * jnp.cos(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)), params)


def reading(objective: Objective, spec: NetworkSpec, microbatches: int) -> Callable[..., Any]:
    """`(params, frozen, batch) -> (gradients, metrics, prepared)`: the step but for the optimizer, at parameters that have moved."""

    def read(params: PyTree, frozen: PyTree, batch: PyTree) -> Any:
        nets = Networks(params, frozen, spec, row_chunks=microbatches)
        batch = fill_reference(nets, batch)
        batch, _, prepared = objective.prepare(nets, batch, objective.init_carry(nets), jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), jax.tree.leaves(batch)[0].shape[0])
        grads, metrics = gradients(objective, nets.replace(params=moved(params)), batch, keys, microbatches)
        return grads, metrics, prepared

    return read


@functools.cache
def alone(name: str, microbatches: int = 1) -> Any:
    """`reading` on one device without a mesh, as NumPy."""
    nets = networks(name)
    out = tiny.jit(reading(bound(name), nets.spec, microbatches))(nets.params, nets.frozen, batch(name))
    return jax.tree.map(np.asarray, out)


def same(found: Any, expected: Any) -> None:
    """Gradients within the design's tolerance, metrics within rounding."""
    tiny.near(found[0], expected[0])
    assert found[1].keys() == expected[1].keys() and found[2].keys() == expected[2].keys()
    tiny.close(found[1:], expected[1:], rtol=1e-5, atol=1e-5)
