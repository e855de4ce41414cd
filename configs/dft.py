"""Dynamic fine-tuning on demonstrations: SFT with each token weighted by its own probability.

    rlhf-jax train --config configs/dft.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/dft.py:tiny --workdir runs/dft_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/sft.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "sft", arg)
    c.objective = ConfigDict(dict(name="dft"))
    c.validation.update(metric="eval/logps/mean", mode="max")  # the loss is 0 at a probability of 0 too
    return c
