"""Conservative DPO from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/cdpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/cdpo.py:tiny --workdir runs/cdpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="cdpo", beta=0.1, epsilon=0.1))  # epsilon: share of the labels taken to be flipped
    c.validation.metric = "eval/loss/cdpo"
    return c
