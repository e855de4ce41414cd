"""DAPO: GRPO for long reasoning on verifiable rewards: clip-higher, token mean, no KL, soft punishment of length, no groups without signal.

    rlhf-jax train --config configs/dapo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_fn=my.reward --workdir DIR
    rlhf-jax train --config configs/dapo.py:tiny --workdir runs/dapo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.reference_from = ""  # β = 0 needs none
    c.objective.update(
        name="dapo", beta=0.0, clip_low=0.2, clip_high=0.28, missing_eos_penalty=0.0,
        overlong_length=512, overlong_buffer=102,  # tokens: sampling.max_new_tokens and a fifth of it
        mask_truncated=True, filter_groups=True,
    )
    c.schedule.refill = 9  # rounds of further prompts in the place of groups of equal scores; the paper's go on until the batch is full
    c.run.update(minibatches=4)  # updates per rollout; 16 in the paper
    if arg == "tiny":  # eight tokens of a fresh model rarely end
        c.objective.update(mask_truncated=False, overlong_length=8, overlong_buffer=2)
    return c
