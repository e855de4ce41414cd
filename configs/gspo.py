"""GSPO: GRPO with one ratio per completion.

    rlhf-jax train --config configs/gspo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_fn=my.reward --workdir DIR
    rlhf-jax train --config configs/gspo.py:tiny --workdir runs/gspo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.reference_from = ""  # β = 0 needs none
    c.objective.update(name="gspo", beta=0.0, ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, missing_eos_penalty=0.0)
    c.run.update(minibatches=4)  # updates per rollout, as in the paper
    return c
