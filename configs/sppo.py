"""SPPO: one round of self-play from a policy that wrote the pairs, which is also the reference.

    rlhf-jax train --config configs/sppo.py --config.data.train=…jsonl --config.init_from=runs/last_round --workdir DIR
    rlhf-jax train --config configs/sppo.py:tiny --workdir runs/sppo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(name="sppo", eta=1000.0))  # nats between the log-ratios of a sure winner and a sure loser
    c.validation.metric = "eval/loss/sppo"
    return c
