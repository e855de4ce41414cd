"""GRPO on a game of several turns: a number is guessed, and the environment says higher or lower.

    rlhf-jax train --config configs/grpo_guess.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/grpo_guess.py:tiny --workdir runs/grpo_guess_tiny      two steps in CI, seconds on a CPU

Rows of the data file hold the range, and may hold the number: {"prompt": "Guess my number, 1 to 15.", "low": 1, "high": 15}. `:demo` holds the values
of experiments/envs. What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like
from rlhf_jax.envs import sample_file

DIGITS_AND_END = (*range(21, 31), 5)  # tokens of the byte tokenizer


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.reference_from = ""  # β = 0 needs none
    c.objective.beta = 0.0
    c.reward_fn, c.reward_normalise = "", False
    c.env.update(name="guess", max_turns=8, max_tokens=512)
    c.env.parameters = ConfigDict(dict(
        low=1, high=100,  # the range of rows that name none
        turn_cost=0.05,  # reward; taken off for every turn before the right one
        role="user",  # of the replies
    ))
    c.sampling.max_new_tokens = 128
    if arg == "tiny":
        c.data.update(train=sample_file("guess"), valid=sample_file("guess"), prompt_length=32)
        c.env.update(max_turns=3, max_tokens=72, widths=1, halvings=1)
        c.sampling.update(max_new_tokens=3, filters=(  # a fresh model would write noise, and never end
            {"name": "logit_bias", "bias": {5: 2.0}}, {"name": "allowed", "ids": DIGITS_AND_END},
        ))
    elif arg == "demo":
        c.data.update(prompt_length=32)
        c.model.context = 96
        c.objective.update(advantage_eps=0.05, missing_eos_penalty=0.0)
        c.env.update(max_turns=4, max_tokens=48, widths=1, halvings=1)
        c.run.update(steps=30, batch_size=128)
        c.sampling.max_new_tokens = 4
        c.optimizer.update(lr=3e-4, warmup_steps=5)
        c.validation.every = c.checkpoint.every = 15
        c.log.every = 1
    return c
