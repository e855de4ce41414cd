"""DiscoPOP from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/discopop.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/discopop.py:tiny --workdir runs/discopop_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="discopop", beta=0.05, tau=0.05))  # below tau = 0.2 pairs may stay behind: see the objective
    c.validation.metric = "eval/loss/discopop"
    return c
