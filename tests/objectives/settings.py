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
    "sft": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "lm": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "forward_kl": {"temperature": 1.5},
    "reverse_kl": {"temperature": 1.5},
    "gkd": {"beta": 0.3, "temperature": 0.8},
    "on_policy_gkd": {"beta": 0.7, "temperature": 1.5},
    "on_policy_reverse_kl": {"temperature": 0.8},
    "reward": {"center_coef": 0.05},
    "bco": {"beta": 0.4},
    "kto": {"beta": 0.4, "desirable_weight": 0.8, "undesirable_weight": 1.3},
    "dpo": {"beta": 0.3},
    "cdpo": {"beta": 0.3},
    "robust_dpo": {"beta": 0.3},
    "ipo": {"tau": 0.4},
    "hinge": {"beta": 0.3},
    "exo": {"beta": 0.3, "epsilon": 0.05},
    "nca": {"beta": 0.3},
    "sppo": {"eta": 2.0},
    "apo_zero": {"beta": 0.3},
    "apo_down": {"beta": 0.3},
    "discopop": {"beta": 0.3, "tau": 0.4},
    "dpo_norm": {"beta": 1.5},
    "f_dpo": {"beta": 0.3, "divergence": "alpha"},
    "ld_dpo": {"beta": 0.3},
    "r_dpo": {"beta": 0.3, "alpha": 0.05},
    "wpo": {"beta": 0.3, "weight_max": 1.0},
    "aot": {"beta": 0.3},
    "aot_unpaired": {"beta": 0.3},
    "bco_pair": {"beta": 0.3},
    "beta_dpo": {"beta": 0.3},
    "tr_dpo": {"beta": 0.3, "sync_every": 2},
    "rpo": {"beta": 0.3, "alpha": 0.5},
    "mpo": {"beta": 0.3},
    "alphapo": {"alpha": -0.5},
    "cpo": {"beta": 0.3, "alpha": 0.5, "epsilon": 0.1},
    "orpo": {"odds_coef": 0.5},
    "ppo": {"kl_target": 0.5, "kl_horizon": 100.0, "gamma": 0.99, "value_coef": 0.5, "entropy_coef": 0.01, "whiten_rewards": True,
            "dual_clip": 1.5},
    "ppo_ptx": {"kl_target": 0.5, "kl_horizon": 100.0, "entropy_coef": 0.01, "ptx_coef": 0.7},
    "grpo": {"clip_high": 0.28},
    "dr_grpo": {"beta": 0.1, "kl_estimator": "k2", "entropy_coef": 0.05, "dual_clip": 1.3, "length_scale": 7.0},
    "dapo": {"overlong_length": 5, "overlong_buffer": 3, "correction": "token_truncate", "correction_low": 0.1, "correction_high": 1.1},
    "bnpo": {"beta": 0.1, "unbiased_kl": True, "advantage_scale": "batch", "missing_eos_penalty": 0.5},
    "gspo": {"clip_low": 0.05, "clip_high": 0.1, "beta": 0.05, "kl_in": "reward", "correction": "sequence_mask", "correction_low": 1e-3},
    "cispo": {"clip_low": 0.1, "clip_high": 0.2, "off_policy_kl": 0.3},
    "sapo": {"temperature_pos": 2.0, "temperature_neg": 3.0, "entropy_quantile": 0.5, "beta": 0.05},
    "gmpo": {"clip_low": 0.1, "clip_high": 0.1, "entropy_quantile": 0.3},
    "luspo": {"clip_low": 0.05, "clip_high": 0.1, "correction": "token_mask", "correction_low": 0.1},
    "vespo": {"beta": 0.05, "correction": "token_truncate", "correction_low": 0.5, "correction_high": 1.5},
    "reinforce": {"beta": 0.2, "correction": "sequence_truncate", "correction_low": 0.01, "entropy_coef": 0.05},
    "reinforce_pp": {"beta": 0.2, "gamma": 0.9, "dual_clip": 1.3},
    "rloo": {"beta": 0.2, "clip_low": 0.4, "clip_high": 0.5, "reward_clip": 1.0, "normalise_advantages": True},
    "online_ipo": {"tau": 0.4},
    "xpo": {"alpha": 0.2},
    "nash_md": {"tau": 0.3},
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
