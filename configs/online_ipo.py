"""Online IPO from the SFT policy, which is also the reference: two samples of each prompt, judged by a reward model's score.

    rlhf-jax train --config configs/online_ipo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_from=runs/rm --workdir DIR
    rlhf-jax train --config configs/online_ipo.py:tiny --workdir runs/online_ipo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.objective = ConfigDict(dict(name="online_ipo", tau=1.0, missing_eos_penalty=1.0))  # the target margin is 1 / (2 tau) nats; reward
    c.sampling.group_size = 2  # samples per prompt, even: neighbours make a pair
    if not arg:
        c.optimizer.update(lr=5e-7, warmup_steps=150)
    return c
