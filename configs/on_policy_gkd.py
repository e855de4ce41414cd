r"""Generalised knowledge distillation on the student's own samples: prompts alone, no reward.

    rlhf-jax train --config configs/on_policy_gkd.py --config.data.train=…jsonl --config.init_from=runs/sft \
        --config.reference_from=runs/teacher --workdir DIR
    rlhf-jax train --config configs/on_policy_gkd.py:tiny --workdir runs/on_policy_gkd_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    # The teacher's run: any size, the same vocabulary. "init" teaches nothing (the divergence is 0): `:tiny` only shows that the steps run.
    c.reference_from = "init" if arg == "tiny" else ""
    c.reward_from = c.reward_fn = ""
    c.objective = ConfigDict(dict(name="on_policy_gkd", beta=0.5, temperature=1.0))  # τ of both softmaxes; sampling has its own
    c.sampling.group_size = 1
    c.optimizer.lr = 1e-3 if arg == "tiny" else 1e-5
    c.validation.update(metric="eval/loss/on_policy_gkd", mode="min")  # on fresh samples
    return c
