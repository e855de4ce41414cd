"""Length-normalised DPO from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/dpo_norm.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/dpo_norm.py:tiny --workdir runs/dpo_norm_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="dpo_norm", beta=5.0))  # per token
    c.validation.metric = "eval/loss/dpo_norm"
    return c
