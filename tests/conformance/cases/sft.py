"""Negative log-likelihood and DFT: `<loss>__n<divisor>`, None being the number of trained tokens."""

from __future__ import annotations

from rlhf_jax.objectives import dft, sft
from rlhf_jax.types import Mean
from tests.conformance.cases._maths import value_and_slope
from tests.conformance.runner import NoFunction

LOSSES = {"nll": sft.nll_loss, "dft": dft.dft_loss}


def cases(vectors):
    return [(name, lambda name=name: _case(vectors, name)) for name in vectors.named("loss/")]


def _case(v, name):
    loss, _, divisor = name.partition("__n")
    if loss not in LOSSES:
        raise NoFunction(loss)
    mask = v["labels"][:, 1:] != -100
    count = mask.sum() if divisor == "None" else float(divisor)
    f = lambda x: Mean.of(LOSSES[loss](x), mask).total / count  # noqa: E731
    yield from value_and_slope(f, v["logps"], v[f"loss/{name}"], v[f"grad/{name}"], mask)
