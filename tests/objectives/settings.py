"""Every built-in objective with ordinary hyper-parameters and a batch of its type, for the tests that hold for all of them."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax import objectives
from rlhf_jax.types import Comparisons, Rollout, Sequences
from tests.objectives import tabular

PPO = {"name": "ppo", "kl_coef": 0.05, "kl_target": 0.5, "kl_horizon": 100.0, "gamma": 0.99, "lam": 0.95, "clip": 0.2, "value_clip": 0.2,
       "value_coef": 0.5, "entropy_coef": 0.01, "missing_eos_penalty": 1.0, "reward_scale": 1.0, "reward_clip": float("inf"),
       "whiten_rewards": True}
GRPO = {"name": "grpo", "beta": 0.04, "clip_low": 0.2, "clip_high": 0.28, "missing_eos_penalty": 1.0, "advantage_eps": 1e-4}
CONFIGS: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft", "z_loss": 1e-2},
    "lm": {"name": "lm", "z_loss": 1e-2},
    "reward": {"name": "reward", "center_coef": 0.05},
    "dpo": {"name": "dpo", "beta": 0.3},
    "ppo": PPO,
    "grpo": GRPO,
}
V = 5


@functools.cache
def bound(name: str) -> objectives.Objective:
    """One object per objective, so that jitted functions are traced once."""
    return objectives.bind(CONFIGS[name])


def case(name: str, *, rows: int = 6, length: int = 8, seed: int = 0, filler: bool = True) -> tuple[Any, tabular.TabularNets, Any]:
    """(objective, nets, batch): the batch prepared, the policy then moved so that ratios differ from 1."""
    rng = np.random.default_rng(seed)
    chosen, fake = bound(name), tabular.nets(rng, V)
    make = {Sequences: lambda: tabular.sequences(rng, (rows, length), V, filler=filler, packed=True),
            Comparisons: lambda: tabular.comparisons(rng, rows, length, V, filler=filler, margin=True),
            Rollout: lambda: tabular.rollout(rng, rows, length, V, filler=filler)}
    batch = tabular.with_reference(fake, make[chosen.batch_type]())
    batch, _, _ = tabular.prepare(chosen, fake, batch)
    moved = {k: v + 0.2 * jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in fake.params.items()}
    return chosen, fake.replace(params=moved), batch
