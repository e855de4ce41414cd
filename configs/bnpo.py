"""GRPO averaged over all tokens of an update: long completions count for their length.

    rlhf-jax train --config configs/bnpo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_fn=my.reward --workdir DIR
    rlhf-jax train --config configs/bnpo.py:tiny --workdir runs/bnpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.reference_from = ""  # β = 0 needs none
    c.objective.update(name="bnpo", beta=0.0, missing_eos_penalty=0.0)
    return c
