"""Dr. GRPO: GRPO without the divisions by the group's deviation and by the length.

    rlhf-jax train --config configs/dr_grpo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_fn=my.reward --workdir DIR
    rlhf-jax train --config configs/dr_grpo.py:tiny --workdir runs/dr_grpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.reference_from = ""  # β = 0 needs none
    c.objective.update(
        name="dr_grpo", beta=0.0, advantage_scale="none", missing_eos_penalty=0.0,
        length_scale=512.0,  # tokens: sampling.max_new_tokens
    )
    return c
