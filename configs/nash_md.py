"""Nash-MD from the SFT policy: its samples against those of its mixture with the reference, compared by a reward model's scores.

    rlhf-jax train --config configs/nash_md.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_from=runs/reward --workdir DIR
    rlhf-jax train --config configs/nash_md.py:tiny --workdir runs/nash_md_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.objective = ConfigDict(dict(
        name="nash_md",
        tau=0.008,  # probability per nat of KL from the reference
        mixture=0.125,  # the reference's share in the opponent
        missing_eos_penalty=1.0,  # log-odds
    ))
    c.reward_normalise = False  # a difference of raw scores is the log-odds of a preference
    c.sampling.group_size = 2  # samples per prompt, even: of each two the mixture draws the second
    return c
