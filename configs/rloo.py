"""RLOO: REINFORCE with a leave-one-out baseline on a reward model's score and a KL penalty per completion.

    rlhf-jax train --config configs/rloo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_from=runs/reward --workdir DIR
    rlhf-jax train --config configs/rloo.py:tiny --workdir runs/rloo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.objective = ConfigDict(dict(
        name="rloo", beta=0.03, kl_estimator="k1", kl_in="reward", unbiased_kl=False,  # unbiased_kl: of a KL in the loss
        reward_clip=float("inf"), normalise_advantages=False, advantage_eps=1e-4, missing_eos_penalty=0.0, mask_truncated=False,
        clip_low=1.0, clip_high=float("inf"), dual_clip=float("inf"),  # of the sequence's ratio: 1 and inf are no bounds
        entropy_coef=0.0, off_policy_kl=float("inf"),
        correction="none", correction_low=0.0, correction_high=3.0,
    ))
    c.sampling.update(group_size=4)  # samples per prompt
    return c
