"""The hinge loss of SLiC and RSO from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/hinge.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/hinge.py:tiny --workdir runs/hinge_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="hinge", beta=0.05))  # pairs with a margin of 1 / beta nats do not count
    c.validation.metric = "eval/loss/hinge"
    return c
