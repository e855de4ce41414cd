"""REINFORCE on a reward model's score with a KL penalty and the batch's mean as baseline.

    rlhf-jax train --config configs/reinforce.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_from=runs/reward --workdir DIR
    rlhf-jax train --config configs/reinforce.py:tiny --workdir runs/reinforce_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.objective = ConfigDict(dict(
        name="reinforce", beta=0.05, kl_estimator="k1", kl_in="reward", unbiased_kl=False,  # unbiased_kl: of a KL in the loss
        batch_baseline=True, missing_eos_penalty=1.0, mask_truncated=False, entropy_coef=0.0, off_policy_kl=float("inf"),
        correction="none", correction_low=0.0, correction_high=3.0,
    ))
    c.sampling.update(group_size=1)  # samples per prompt
    return c
