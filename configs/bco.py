"""BCO on thumbs up and down from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/bco.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/bco.py:tiny --workdir runs/bco_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/kto.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "kto", arg)
    c.objective = ConfigDict(dict(name="bco", beta=0.01))
    c.validation.update(metric="eval/reward/accuracy", mode="max")
    if not arg:
        c.optimizer.lr = 5e-7  # as on pairs
    return c
