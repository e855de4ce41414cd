"""GRPO on verifiable rewards: the right answer, and in the right form. No reward model, no KL.

    rlhf-jax train --config configs/grpo_rules.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/grpo_rules.py:tiny --workdir runs/grpo_rules_tiny      two steps in CI, seconds on a CPU

Rows of the data file hold what the rule compares with: {"prompt": "…", "answer": "\\\\frac{1}{2}"}. What is not written here is configs/grpo.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "grpo", arg)
    c.reference_from = ""  # β = 0 needs none
    c.objective.beta = 0.0
    c.reward_fn, c.reward_normalise = "", False
    c.rewards = (
        {"name": "rules.math", "weight": 1.0},
        {"name": "rules.format", "weight": 0.2, "tags": ("think", "answer")},
        {"name": "rules.repetition", "weight": 0.2, "n": 4},
    )
    c.reward_failure.policy = "mask"  # a row without an answer in the file is not trained on; counted as reward/failed
    if arg == "tiny":  # the sample prompts come without answers, and a fresh model writes noise
        c.rewards = (
            {"name": "rules.regex", "pattern": "[a-z]", "weight": 0.5},
            {"name": "rules.length", "low": 0, "high": 4, "slack": 8, "clip": (0.0, 0.9)},
        )
    return c
