"""GRPO on episodes with a tool: the policy may call a calculator, and its answer is checked.

    rlhf-jax train --config configs/grpo_calculator.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/grpo_calculator.py:tiny --workdir runs/grpo_calculator_tiny      two steps in CI, seconds on a CPU

Rows of the data file hold the answer: {"prompt": "What is 34*8?", "answer": 272}. `:demo` holds the values of experiments/envs. What is not written
here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like
from rlhf_jax.envs import sample_file


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.reference_from = ""  # β = 0 needs none
    c.objective.beta = 0.0
    c.reward_fn, c.reward_normalise = "", False
    c.env.update(name="calculator", max_turns=4, max_tokens=1024)
    c.env.parameters = ConfigDict(dict(role="user"))  # of the replies; tool where the template knows tools, `plain` does not
    if arg == "tiny":
        c.data.update(train=sample_file("calculator"), valid=sample_file("calculator"), prompt_length=20)
        c.env.update(max_turns=2, max_tokens=72, widths=1, halvings=0)
        c.objective.entropy_coef = 0.01  # a fresh model earns nothing, and all its advantages are 0
    elif arg == "demo":
        c.data.update(prompt_length=20)
        c.model.context = 192
        c.objective.update(advantage_eps=0.05, missing_eos_penalty=0.0)
        c.env.update(max_turns=3, max_tokens=168, widths=1, halvings=1)
        c.run.update(steps=40, batch_size=64)
        c.sampling.update(max_new_tokens=88)
        c.optimizer.update(lr=3e-4, warmup_steps=5)
        c.validation.every = c.checkpoint.every = 20
        c.log.every = 1
    return c
