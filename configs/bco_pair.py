"""BCO on pairs from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/bco_pair.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/bco_pair.py:tiny --workdir runs/bco_pair_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="bco_pair", beta=0.01))
    c.validation.update(metric="eval/reward/accuracy", mode="max")
    return c
