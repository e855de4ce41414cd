"""VESPO: a policy gradient for stale rollouts, the weight of the whole sequence reshaped by a Gamma kernel.

    rlhf-jax train --config configs/vespo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_fn=my.reward --workdir DIR
    rlhf-jax train --config configs/vespo.py:tiny --workdir runs/vespo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.reference_from = ""  # β = 0 needs none
    for key in ("clip_low", "clip_high", "dual_clip", "ratio_level"):
        del c.objective[key]
    c.objective.update(name="vespo", beta=0.0, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0, missing_eos_penalty=0.0)
    c.run.update(minibatches=4)  # updates per rollout
    return c
