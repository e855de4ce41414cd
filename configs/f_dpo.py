"""DPO with another divergence from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/f_dpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/f_dpo.py:tiny --workdir runs/f_dpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(
        name="f_dpo", beta=0.1,
        divergence="jensen_shannon",  # reverse_kl | forward_kl | jensen_shannon | alpha
        alpha=0.5,  # of "alpha" alone: 0 is the reverse KL, 1 the forward KL
    ))
    c.validation.metric = "eval/loss/f_dpo"
    return c
