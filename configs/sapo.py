"""SAPO: GRPO with a smooth gate in place of the clip.

    rlhf-jax train --config configs/sapo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_fn=my.reward --workdir DIR
    rlhf-jax train --config configs/sapo.py:tiny --workdir runs/sapo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.reference_from = ""  # β = 0 needs none
    for key in ("clip_low", "clip_high", "dual_clip"):
        del c.objective[key]
    c.objective.update(name="sapo", beta=0.0, temperature_pos=1.0, temperature_neg=1.05, missing_eos_penalty=0.0)
    c.run.update(minibatches=4)  # updates per rollout
    return c
