"""Every built-in objective with hyper-parameters that exercise it and a batch of its type, for the tests that hold for all of them."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax import objectives
from rlhf_jax.types import Comparisons, Labelled, Rollout, Sequences, Unpaired
from tests.objectives import tabular

OVERRIDES: dict[str, dict[str, Any]] = {  # in place of a module's DEFAULTS, where those leave a part of it switched off
    "sft": {"z_loss": 1e-2},
    "lm": {"z_loss": 1e-2},
    "reward": {"center_coef": 0.05},
    "dpo": {"beta": 0.3},
    "ppo": {"kl_target": 0.5, "kl_horizon": 100.0, "gamma": 0.99, "value_coef": 0.5, "entropy_coef": 0.01, "whiten_rewards": True},
    "grpo": {"clip_high": 0.28},
}
V = 5


def config(name: str, **changes: Any) -> dict[str, Any]:
    """`config.objective` of an objective."""
    return {"name": name, **objectives.load(name).DEFAULTS, **OVERRIDES.get(name, {}), **changes}


CONFIGS = {name: config(name) for name in objectives.names()}


@functools.cache
def bound(name: str) -> objectives.Objective:
    """One object per objective, so that jitted functions are traced once."""
    return objectives.bind(CONFIGS[name])


def random_batch(kind: type, rng: np.random.Generator, *, rows: int = 6, length: int = 8, filler: bool = True, packed: bool = True) -> Any:
    """A batch of a type, as the data pipeline or the sampler would hand it over."""
    make = {
        Sequences: lambda: tabular.sequences(rng, (rows, length), V, filler=filler, packed=packed),
        Comparisons: lambda: tabular.comparisons(rng, rows, length, V, filler=filler, margin=True),
        Unpaired: lambda: tabular.unpaired(rng, rows, length, V, filler=filler),
        Labelled: lambda: tabular.labelled(rng, rows, length, V, filler=filler),
        Rollout: lambda: tabular.rollout(rng, rows, length, V, filler=filler),
    }
    return make[kind]()


def case(name: str, *, rows: int = 6, length: int = 8, seed: int = 0, filler: bool = True) -> tuple[Any, tabular.TabularNets, Any]:
    """(objective, nets, batch): the batch prepared, the policy then moved so that ratios differ from 1."""
    rng = np.random.default_rng(seed)
    chosen, fake = bound(name), tabular.nets(rng, V)
    batch = tabular.with_reference(fake, random_batch(chosen.batch_type, rng, rows=rows, length=length, filler=filler))
    batch, _, _ = tabular.prepare(chosen, fake, batch)
    return chosen, moved(fake, rng), batch


def moved(fake: tabular.TabularNets, rng: np.random.Generator, size: float = 0.2) -> tabular.TabularNets:
    """Other parameters nearby."""
    return fake.replace(params={k: v + size * jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in fake.params.items()})
