"""Lists the objectives, or shows one with its equation, paper and hyper-parameters.

  rlhf-jax objectives
  rlhf-jax objectives dpo
  rlhf-jax objectives my_lab.simpo     a module of your own
"""

from __future__ import annotations

from rlhf_jax.errors import UserError

FLAGS_HELP = {"NAME": "one objective, by the name that config.objective.name takes; without it, all of them"}
OPERANDS = 1


def main(names: list[str]) -> int:
    """Runs the command on the names given after it, at most one."""
    from rlhf_jax.objectives import _catalogue

    if not names:
        print(_catalogue.overview())
        return 0
    try:
        print(_catalogue.card(_catalogue.entry(names[0])))
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0
