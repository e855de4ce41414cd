"""GMPO: GRPO on the geometric mean of the ratios, with a wide clip in log space.

    rlhf-jax train --config configs/gmpo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_fn=my.reward --workdir DIR
    rlhf-jax train --config configs/gmpo.py:tiny --workdir runs/gmpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.reference_from = ""  # β = 0 needs none
    for key in ("dual_clip", "ratio_level"):
        del c.objective[key]
    c.objective.update(name="gmpo", beta=0.0, clip_low=0.4, clip_high=0.4, missing_eos_penalty=0.0)  # nats
    c.run.update(minibatches=4)  # updates per rollout
    return c
