"""CISPO: capped importance weights on the policy gradient, several updates per rollout.

    rlhf-jax train --config configs/cispo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_fn=my.reward --workdir DIR
    rlhf-jax train --config configs/cispo.py:tiny --workdir runs/cispo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.reference_from = ""  # β = 0 needs none
    c.objective.update(name="cispo", beta=0.0, clip_low=1.0, clip_high=4.0, missing_eos_penalty=0.0)  # weights in [0, 5]
    del c.objective.dual_clip
    c.run.update(minibatches=4)  # updates per rollout
    return c
