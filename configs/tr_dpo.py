"""TR-DPO from the SFT policy, where its moving reference starts too.

    rlhf-jax train --config configs/tr_dpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/tr_dpo.py:tiny --workdir runs/tr_dpo_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.reference_from = ""
    c.objective = ConfigDict(dict(
        name="tr_dpo", beta=0.05,
        alpha=0.6,  # how far the reference goes to the policy; 1 = all the way
        sync_every={"tiny": 2, "demo": 50}.get(arg, 512),  # batches between two moves
    ))
    c.validation.update(metric="eval/logps/accuracy", mode="max")  # the loss falls, then jumps back with every move of its reference
    if not arg:
        c.optimizer.lr = 1e-6  # the paper's
    return c
