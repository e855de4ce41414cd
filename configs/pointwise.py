"""A reward model that is regressed on ratings of single responses, usually started from the SFT policy.

    rlhf-jax train --config configs/pointwise.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/pointwise.py:tiny --workdir runs/pointwise_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/reward.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like
from rlhf_jax.data import sample_file


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "reward", arg)
    c.objective = ConfigDict(dict(name="pointwise"))
    c.data.kind = "rating"
    c.validation.update(metric="eval/loss/pointwise", mode="min")
    if arg == "tiny":
        c.data.update(train=sample_file("rating"), valid=sample_file("rating"))
    return c
