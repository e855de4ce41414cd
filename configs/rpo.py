"""Iterative RPO: one round from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/rpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/rpo.py:tiny --workdir runs/rpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="rpo", beta=0.1, alpha=1.0))  # alpha: weight of the chosen response's likelihood
    c.validation.metric = "eval/loss/dpo"
    return c
