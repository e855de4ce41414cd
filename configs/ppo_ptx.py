r"""PPO that goes on training on text as in pre-training, against the loss of what the model knew (InstructGPT).

    rlhf-jax train --config configs/ppo_ptx.py --config.data.train=…jsonl --config.ptx.train=…jsonl --config.init_from=runs/sft \
        --config.reward_from=runs/reward --workdir DIR
    rlhf-jax train --config configs/ppo_ptx.py:tiny --workdir runs/ppo_ptx_tiny      two steps in CI, seconds on a CPU

What is not written here is configs/ppo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like
from rlhf_jax.data import sample_file


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "ppo", arg)
    c.objective.update(name="ppo_ptx", ptx_coef=27.8)  # γ of InstructGPT
    c.ptx = ConfigDict(dict(  # the second data set: run.batch_size rows of it go with every iteration's completions
        kind="text",  # text | demo, whose responses alone are trained on
        train="",  # JSONL file or folder
        max_length=1024,  # tokens of a row
        pack=True,  # several texts per row
        overlong="truncate",  # error | truncate | skip a longer demonstration; longer text is cut into rows
    ))
    if arg == "tiny":
        c.ptx.update(train=sample_file("text"), max_length=64)
    return c
