"""MPO from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/mpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/mpo.py:tiny --workdir runs/mpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(
        name="mpo", beta=0.1,
        preference_weight=0.8, quality_weight=0.2, generation_weight=1.0,  # of DPO's loss, BCO's and the likelihood
    ))
    c.validation.update(metric="eval/reward/accuracy", mode="max")
    if not arg:
        c.optimizer.lr = 5e-6  # the paper's
    return c
