"""Distillation: `beta<β>_T<temperature>_<reduction>`. At β = 0 and 1 TRL puts the two KLs, which ours are functions of their own."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from rlhf_jax.ops.distillation import forward_kl, generalised_jsd, reverse_kl
from rlhf_jax.types import Mean
from tests.conformance.cases._maths import value_and_slope
from tests.conformance.runner import Comparison, NoFunction, options


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("loss/")]


def _case(v, name):
    rest, _, reduction = name.rpartition("_")
    _, given = options(f"__{rest}", ("beta", "T"))
    beta, temperature = float(given["beta"]), float(given["T"])
    divergence = {0.0: forward_kl, 1.0: reverse_kl}.get(beta, functools.partial(generalised_jsd, beta=beta))
    mask = jnp.asarray(v["labels"]) != -100
    divisors = {"batchmean": mask.sum(), "sum": 1.0, "mean": mask.sum() * v["student_logits"].shape[-1]}
    if reduction not in divisors:
        raise NoFunction(f"the reduction {reduction}")

    def f(student):
        return Mean.of(divergence(student / temperature, jnp.asarray(v["teacher_logits"]) / temperature), mask).total / divisors[reduction]

    if f"grad/{name}" in v:
        yield from value_and_slope(f, v["student_logits"], v[f"loss/{name}"], v[f"grad/{name}"])
    else:
        yield Comparison("loss", f(jnp.asarray(v["student_logits"])), v[f"loss/{name}"])
