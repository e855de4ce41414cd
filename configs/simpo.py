"""SimPO from the SFT policy, without a reference.

    rlhf-jax train --config configs/simpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/simpo.py:tiny --workdir runs/simpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.reference_from = ""
    c.objective = ConfigDict(dict(name="simpo", beta=2.5, gamma=1.375))  # per token
    c.validation.metric = "eval/loss/simpo"
    if not arg:
        c.optimizer.lr = 1e-6  # the paper's
    return c
