"""NCA from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/nca.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/nca.py:tiny --workdir runs/nca_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="nca", beta=0.01))
    c.validation.metric = "eval/loss/nca"
    if not arg:
        c.optimizer.lr = 5e-7  # the authors' 5e-6 goes with QLoRA
    return c
