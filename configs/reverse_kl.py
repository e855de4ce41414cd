r"""Distillation on demonstrations, by the KL that keeps the student to what the teacher is sure of.

    rlhf-jax train --config configs/reverse_kl.py --config.data.train=…jsonl --config.init_from=runs/sft \
        --config.reference_from=runs/teacher --workdir DIR
    rlhf-jax train --config configs/reverse_kl.py:tiny --workdir runs/reverse_kl_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/sft.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "sft", arg)
    # The teacher's run: any size, the same vocabulary. "init" teaches nothing (the divergence is 0): `:tiny` only shows that the steps run.
    c.reference_from = "init" if arg == "tiny" else ""
    c.objective = ConfigDict(dict(name="reverse_kl", temperature=1.0))  # both networks' softmax
    c.validation.metric = "eval/loss/reverse_kl"
    return c
