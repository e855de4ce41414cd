"""Length-regularised DPO from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/r_dpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/r_dpo.py:tiny --workdir runs/r_dpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="r_dpo", beta=0.1, alpha=0.01))  # alpha: reward per token of length
    c.validation.metric = "eval/loss/r_dpo"
    return c
