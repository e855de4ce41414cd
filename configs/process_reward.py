"""A process reward model on answers whose every step is said to be right or wrong, usually started from the SFT policy.

    rlhf-jax train --config configs/process_reward.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/process_reward.py:tiny --workdir runs/process_reward_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/reward.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like
from rlhf_jax.data import sample_file


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "reward", arg)
    c.objective = ConfigDict(dict(name="process_reward"))
    c.data.kind = "stepwise"
    c.validation.update(metric="eval/reward/step_accuracy", mode="max")
    if arg == "tiny":
        c.data.update(train=sample_file("stepwise"), valid=sample_file("stepwise"))
    return c
