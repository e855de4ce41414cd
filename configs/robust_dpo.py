"""Robust DPO from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/robust_dpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/robust_dpo.py:tiny --workdir runs/robust_dpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="robust_dpo", beta=0.01, epsilon=0.1))  # epsilon: share of the labels that are flipped
    c.validation.metric = "eval/loss/robust_dpo"
    return c
