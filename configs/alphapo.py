"""AlphaPO from the SFT policy, without a reference.

    rlhf-jax train --config configs/alphapo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/alphapo.py:tiny --workdir runs/alphapo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.reference_from = ""
    c.objective = ConfigDict(dict(name="alphapo", beta=2.5, gamma=0.25, alpha=0.25))  # alpha: shape of the reward, 0 is SimPO
    c.validation.metric = "eval/loss/alphapo"
    if not arg:
        c.optimizer.lr = 7e-7  # the paper's
    return c
