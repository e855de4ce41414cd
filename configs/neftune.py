"""Supervised fine-tuning with uniform noise on the embeddings.

    rlhf-jax train --config configs/neftune.py --config.data.train=…jsonl --config.init_from=runs/base --workdir DIR
    rlhf-jax train --config configs/neftune.py:tiny --workdir runs/neftune_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/sft.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "sft", arg)
    c.objective = ConfigDict(dict(name="neftune", noise_alpha=5.0))  # the paper tries 5, 10 and 15
    return c
