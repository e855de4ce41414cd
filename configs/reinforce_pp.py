r"""REINFORCE++: PPO's clip and KL per token, advantages whitened over the batch, no critic.

    rlhf-jax train --config configs/reinforce_pp.py --config.data.train=…jsonl --config.init_from=runs/sft \
        --config.reward_from=runs/reward --workdir DIR
    rlhf-jax train --config configs/reinforce_pp.py:tiny --workdir runs/reinforce_pp_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.objective = ConfigDict(dict(
        name="reinforce_pp", beta=0.01, kl_estimator="k1", kl_in="reward", unbiased_kl=False,  # unbiased_kl: of a KL in the loss
        gamma=1.0,
        group_baseline=False,  # True, with sampling.group_size > 1, kl_in="loss" and kl_estimator="k2": the variant with a baseline
        missing_eos_penalty=0.0, mask_truncated=False,
        clip_low=0.2, clip_high=0.2, dual_clip=float("inf"), entropy_coef=0.0, off_policy_kl=float("inf"),
        correction="none", correction_low=0.0, correction_high=3.0,
    ))
    c.sampling.update(group_size=1)  # samples per prompt
    c.run.update(minibatches=4)  # updates per rollout
    return c
