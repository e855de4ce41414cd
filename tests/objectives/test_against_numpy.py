"""Every objective against slow float64 NumPy written from its paper: the value, and the gradient by finite differences.

Over random rows and the edge cases of preference data and rollouts. `tests/reference/of_*.py` holds one function per objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.types import Labelled, Rollout, Sequences, Unpaired
from tests import reference
from tests.objectives import tabular
from tests.objectives.settings import CONFIGS, V, bound, moved, random_batch
from tests.reference.numeric import gradient

FAR = ("fifty nats up", "fifty nats down")  # of these only the value is compared: in float32 a slope of e^±50 is not one of float64


def with_seqs(batch: Any, **leaves: Any) -> Any:
    return batch.replace(**leaves) if isinstance(batch, Sequences) else batch.replace(seqs=batch.seqs.replace(**leaves))


def scenarios(kind: type) -> Iterator[tuple[str, Any]]:
    """(what, batch): all of two shapes, so that an objective is compiled twice."""
    for seed in (0, 1):
        yield f"random rows {seed}", random_batch(kind, np.random.default_rng(seed), packed=False)
    plain = random_batch(kind, np.random.default_rng(2), filler=False, packed=False)
    seqs = plain if isinstance(plain, Sequences) else plain.seqs
    one = np.zeros(seqs.loss_mask.shape, bool)
    last = np.asarray(seqs.segment_ids != 0).cumsum(-1).argmax(-1)
    np.put_along_axis(one, last[..., None], True, axis=-1)
    yield "one token each", with_seqs(plain, loss_mask=jnp.asarray(one))
    yield "an empty mask", with_seqs(plain, loss_mask=seqs.loss_mask & (jnp.arange(6) % 2 == 0).reshape(-1, *[1] * (one.ndim - 1)))
    yield "fifty nats up", plain
    yield "fifty nats down", plain
    yield "other shape", random_batch(kind, np.random.default_rng(3), rows=4, length=6, packed=False)
    if kind is Unpaired:
        yield "all desirable", plain.replace(desirable=jnp.ones(6, bool))
        yield "all undesirable", plain.replace(desirable=jnp.zeros(6, bool))
    if kind is Rollout:
        yield "a group without variance", plain.replace(scores=plain.scores.at[:2].set(0.7))
        yield "no variance at all", plain.replace(scores=jnp.full(6, 0.3))
        yield "all truncated", plain.replace(truncated=jnp.ones(6, bool))
        yield "sampled from elsewhere", plain.replace(
            sampler_logps=jnp.asarray(np.random.default_rng(4).normal(-1.6, 0.5, plain.sampler_logps.shape), jnp.float32))
    if kind is Labelled:
        yield "no label", plain.replace(weights=jnp.zeros_like(plain.weights))


@pytest.mark.parametrize("name", objectives.names())
def test_value_and_gradient(name: str) -> None:
    chosen, slow = bound(name), reference.find(name)
    for number, (what, batch) in enumerate(scenarios(chosen.batch_type)):
        rng = np.random.default_rng(100 + number)
        fake = tabular.nets(rng, V)
        batch = tabular.with_reference(fake, batch)
        prepared, _, _ = tabular.prepare(chosen, fake, batch)
        point = moved(fake, rng)
        if what in FAR:
            shift = 50.0 if what == FAR[0] else -50.0
            point = point.replace(params={k: v.at[..., 1].add(shift) for k, v in point.params.items()})
        value, slopes = tabular.objective(chosen, point, prepared)
        (old, ref), (new, _) = tabular.float64(fake), tabular.float64(point)
        carry = jax.tree.map(np.asarray, chosen.init_carry(fake))
        case = reference.Case(old=old, at=new, ref=ref, batch=tabular.as_numpy(batch), h=CONFIGS[name], carry=carry)
        np.testing.assert_allclose(value, slow(new, case), rtol=5e-5, atol=2e-6, err_msg=f"{name}: value, {what}")
        assert all(np.isfinite(g).all() for g in slopes.values()), what
        if what in FAR:
            continue
        for table in slopes:
            expected = gradient(lambda x, table=table: slow({**new, table: x}, case), new[table])  # noqa: B023
            np.testing.assert_allclose(slopes[table], expected, rtol=2e-3, atol=2e-5, err_msg=f"{name}: slope of {table}, {what}")
