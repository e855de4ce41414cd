"""What is read off logits = softcap(scale · (h Wᵀ + b)) / temperature: `temp<T>`, `bias`, `softcap<c>`, `scale<s>`, "plain" and "all"."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.ops import vocab
from tests.conformance.runner import Comparison, options, slope

ALL = {"temp": "0.7", "bias": "", "softcap": "5", "scale": "0.5"}  # the vectors' README: every option at once
READINGS = {"log_probs": vocab.logps, "entropy": vocab.entropy, "log_sum_sq_probs": vocab.log_sum_sq_probs, "mean_logits": vocab.mean_logit,
            "is_top1": vocab.is_top1}


def cases(vectors):
    names = [key.partition("/")[0] for key in vectors if key.endswith("/log_probs")]
    alone = [("selective_log_softmax", vocab.logps), ("entropy_from_logits", vocab.entropy)]
    return [(name, lambda name=name: _case(vectors, name)) for name in names] + [
        (name, lambda name=name, f=f: _alone(vectors, name, f)) for name, f in alone if name in vectors]


def _logits(v, given, hidden, weight):
    z = hidden @ weight.T
    if "bias" in given:
        z = z + jnp.asarray(v["bias"])[None]
    z = z * float(given.get("scale", 1.0))
    if "softcap" in given:
        z = float(given["softcap"]) * jnp.tanh(z / float(given["softcap"]))
    return z / float(given.get("temp", 1.0))


def _case(v, name):
    given = ALL if name == "all" else {} if name == "plain" else options(f"__{name}", ALL)[1]
    at, target = (jnp.asarray(v["hidden"]), jnp.asarray(v["weight"])), jnp.asarray(v["targets"])
    logits = _logits(v, given, *at)
    for key, reading in READINGS.items():
        yield Comparison(key, reading(logits, target), v[f"{name}/{key}"], atol=1e-5)

    def total(hidden, weight):
        z = _logits(v, given, hidden, weight)
        return vocab.logps(z, target).sum() + 0.1 * vocab.entropy(z, target).sum()

    for got, key in zip(jax.jit(jax.grad(total, (0, 1)))(*at), ("grad_h", "grad_w")):
        yield slope(got, v[f"{name}/{key}"])


def _alone(v, name, reading):
    logits = jnp.asarray(v["hidden"]) @ jnp.asarray(v["weight"]).T
    yield Comparison(name, reading(logits, jnp.asarray(v["targets"])), v[name], atol=1e-5)
