"""WPO from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/wpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/wpo.py:tiny --workdir runs/wpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="wpo", beta=0.01, weight_max=float("inf")))  # weight_max: 1.0 in the authors' code
    c.validation.update(metric="eval/reward/accuracy", mode="max")
    if not arg:
        c.optimizer.lr = 1e-6  # the authors'
    return c
