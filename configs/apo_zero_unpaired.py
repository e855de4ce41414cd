"""APO-zero on thumbs up and down from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/apo_zero_unpaired.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/apo_zero_unpaired.py:tiny --workdir runs/apo_zero_unpaired_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/kto.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "kto", arg)
    c.objective = ConfigDict(dict(name="apo_zero_unpaired", beta=0.1))
    c.validation.metric = "eval/loss/apo_zero_unpaired"
    if not arg:
        c.optimizer.lr = 2e-7  # as on pairs
    return c
