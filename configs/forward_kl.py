r"""Distillation of a teacher's distributions on demonstrations, by the KL that covers all that it might say.

    rlhf-jax train --config configs/forward_kl.py --config.data.train=…jsonl --config.init_from=runs/sft \
        --config.reference_from=runs/teacher --workdir DIR
    rlhf-jax train --config configs/forward_kl.py:tiny --workdir runs/forward_kl_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/sft.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "sft", arg)
    # The teacher's run: any size, the same vocabulary. "init" teaches nothing (the divergence is 0): `:tiny` only shows that the steps run.
    c.reference_from = "init" if arg == "tiny" else ""
    c.objective = ConfigDict(dict(name="forward_kl", temperature=1.0))  # both networks' softmax
    c.validation.metric = "eval/loss/forward_kl"
    return c
