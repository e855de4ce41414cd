"""XPO from the SFT policy, which is also the reference: a sample of each, judged by a reward model's score, and a bonus for exploring.

    rlhf-jax train --config configs/xpo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_from=runs/reward --workdir DIR
    rlhf-jax train --config configs/xpo.py:tiny --workdir runs/xpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.objective = ConfigDict(dict(
        name="xpo", beta=0.1,
        alpha=1e-5,  # weight of the reference's log-probs, which are hundreds of nats
        missing_eos_penalty=1.0,  # reward
    ))
    c.sampling.group_size = 2  # samples per prompt, even: of each two the reference draws the second
    if not arg:
        c.optimizer.update(lr=5e-7, warmup_steps=150)
    return c
