"""CPO from the SFT policy, without a reference.

    rlhf-jax train --config configs/cpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/cpo.py:tiny --workdir runs/cpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.reference_from = ""
    c.objective = ConfigDict(dict(
        name="cpo", beta=0.1,
        alpha=1.0, nll="sum",  # weight of the chosen response's likelihood, and its reduction over tokens: sum | mean
        epsilon=0.0,  # label smoothing
    ))
    c.validation.update(metric="eval/reward/accuracy", mode="max")
    return c
