r"""Generalised knowledge distillation on demonstrations: a Jensen–Shannon divergence of student and teacher.

    rlhf-jax train --config configs/gkd.py --config.data.train=…jsonl --config.init_from=runs/sft \
        --config.reference_from=runs/teacher --workdir DIR
    rlhf-jax train --config configs/gkd.py:tiny --workdir runs/gkd_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/sft.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "sft", arg)
    # The teacher's run: any size, the same vocabulary. "init" teaches nothing (the divergence is 0): `:tiny` only shows that the steps run.
    c.reference_from = "init" if arg == "tiny" else ""
    c.objective = ConfigDict(dict(name="gkd", beta=0.5, temperature=1.0))  # β near 0: like forward KL, near 1: like reverse KL
    c.validation.metric = "eval/loss/gkd"
    return c
