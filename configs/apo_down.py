"""APO-down from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/apo_down.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/apo_down.py:tiny --workdir runs/apo_down_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="apo_down", beta=0.1))
    c.validation.metric = "eval/loss/apo_down"
    if not arg:
        c.optimizer.lr = 2e-7  # the paper's
    return c
