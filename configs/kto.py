"""KTO on thumbs up and down from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/kto.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/kto.py:tiny --workdir runs/kto_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/dpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like
from rlhf_jax.data import sample_file


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "dpo", arg)
    c.objective = ConfigDict(dict(
        name="kto", beta=0.1,
        desirable_weight=1.0, undesirable_weight=1.0,  # with classes of different size, keep the ratio of weight × rows between 1 and 4/3
    ))
    c.data.kind = "feedback"
    c.validation.metric = "eval/loss/kto"
    if arg == "tiny":
        c.data.update(train=sample_file("feedback"), valid=sample_file("feedback"))
    elif not arg:
        c.optimizer.lr = 5e-6  # the authors': up to ten times DPO's
    return c
