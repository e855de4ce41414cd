"""A reward model on rankings of two and more responses, usually started from the SFT policy.

    rlhf-jax train --config configs/plackett_luce.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/plackett_luce.py:tiny --workdir runs/plackett_luce_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/reward.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like
from rlhf_jax.data import sample_file


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "reward", arg)
    c.objective = ConfigDict(dict(name="plackett_luce"))
    c.data.kind = "ranking"
    c.validation.update(metric="eval/reward/accuracy", mode="max")
    if arg == "tiny":
        c.data.update(train=sample_file("ranking"), valid=sample_file("ranking"))
    return c
