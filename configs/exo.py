"""EXO from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/exo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/exo.py:tiny --workdir runs/exo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="exo", beta=0.5, epsilon=1e-3))  # epsilon: label smoothing, above 0
    c.validation.metric = "eval/loss/exo"
    if not arg:
        c.optimizer.lr = 1e-6  # the paper's
    return c
