"""β-DPO from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/beta_dpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/beta_dpo.py:tiny --workdir runs/beta_dpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(
        name="beta_dpo", beta=0.1,
        alpha=0.6,  # how strongly beta follows the reward gap; 0.6 / beta reproduces the authors' runs, whose gaps leave beta out
        keep=0.8,  # share of a batch's pairs that train
        momentum=0.9,  # of the moving mean and deviation of the gaps
    ))
    c.validation.update(metric="eval/reward/accuracy", mode="max")
    return c
