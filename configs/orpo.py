"""ORPO from a base model or an SFT policy, without a reference.

    rlhf-jax train --config configs/orpo.py --config.data.train=…jsonl --config.init_from=runs/base --workdir DIR
    rlhf-jax train --config configs/orpo.py:tiny --workdir runs/orpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.reference_from = ""
    c.objective = ConfigDict(dict(name="orpo", odds_coef=0.1, nll_over="response"))  # "all": the likelihood of the prompt too
    c.validation.update(metric="eval/reward/accuracy", mode="max")
    if not arg:
        c.optimizer.lr = 5e-6  # the paper's
    return c
