"""Lists the objectives, or shows one with its equation, paper and hyper-parameters.

  rlhf-jax objectives
  rlhf-jax objectives dpo
  rlhf-jax objectives my_lab.simpo     a module of your own
  rlhf-jax objectives --markdown       the tables of rlhf_jax/objectives/README.md
"""

from __future__ import annotations

from absl import flags

from rlhf_jax.errors import UserError

FLAGS_HELP = {
    "NAME": "one objective, by the name that config.objective.name takes; without it, all of them",
    "--markdown": "all of them as tables",
}
OPERANDS = 1

flags.DEFINE_bool("markdown", False, "all objectives as tables")


def main(names: list[str]) -> int:
    """Runs the command on the names given after it, at most one."""
    from rlhf_jax.objectives import _catalogue

    if flags.FLAGS.markdown:
        if names:
            raise UserError(f"--markdown prints the tables of all objectives: leave out {names[0]!r}, or the flag")
        print(_catalogue.tables())
        return 0
    if not names:
        print(_catalogue.overview())
        return 0
    try:
        print(_catalogue.card(_catalogue.entry(names[0])))
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0
