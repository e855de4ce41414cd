"""IPO from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/ipo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/ipo.py:tiny --workdir runs/ipo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="ipo", tau=0.1, reduction="sum"))  # the target margin is 1 / (2 tau) nats
    c.validation.metric = "eval/loss/ipo"
    return c
