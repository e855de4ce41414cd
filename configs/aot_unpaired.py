"""AOT on rewards from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/aot_unpaired.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/aot_unpaired.py:tiny --workdir runs/aot_unpaired_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="aot_unpaired", beta=0.01))  # sorts a batch: the larger it is, the better
    c.validation.metric = "eval/loss/aot_unpaired"
    return c
