"""Vectors of our own layout (tests/conformance/publish.py writes them): any JSON file that names an objective."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from rlhf_jax import objectives
from tests.conformance.publish import TYPES, outcome, rebuilt
from tests.conformance.runner import Comparison, NoFunction, slope
from tests.objectives.settings import CONFIGS
from tests.objectives.tabular import TabularNets


def cases(vectors):
    return [(case["name"], lambda case=case: _case(vectors, case)) for case in vectors["cases"]]


def _case(v, case):
    name = v["objective"]
    if name not in objectives.names():
        raise NoFunction(name)
    if v["hyperparameters"] != {key: value for key, value in CONFIGS[name].items() if key != "name"}:
        raise NoFunction(f"{name} with the hyper-parameters {v['hyperparameters']}: tests/objectives/settings.py has others")
    tables = [{key: jnp.asarray(table, jnp.float32) for key, table in case[when].items()} for when in ("old", "at")]
    old, at = (TabularNets(params, {"ref": jnp.asarray(case["reference"], jnp.float32)}) for params in tables)
    got = outcome(name, old, at, rebuilt(TYPES[v["batch"]], case["batch"]))
    expected = case["outcome"]
    yield Comparison("loss", got["loss"], expected["loss"], atol=1e-6)
    for part in ("terms", "metrics"):
        if got[part].keys() != expected[part].keys():
            raise NoFunction(f"{part} {sorted(got[part].keys() ^ expected[part].keys())}")
        for key, value in expected[part].items():
            yield Comparison(key, got[part][key], value, atol=1e-5)
    for table, gradient in expected["gradients"].items():
        yield slope(got["gradients"][table], np.asarray(gradient, np.float64))
