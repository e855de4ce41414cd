"""`rlhf-jax COMMAND [flags]`: finds the command's file, parses its flags, and turns a user's mistake into one sentence.

Exit codes: 0 done, 2 a mistake of the user's (config, data, checkpoint, flags), 75 preempted with the state saved, 1 anything else.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train any objective: SFT, reward model, DPO, PPO, GRPO …, or resume a run",
    "sample": "complete prompts with a trained policy",
    "eval": "evaluate a trained policy or reward model on held-out data",
}
PREEMPTED = 75


def usage() -> str:
    """What `rlhf-jax --help` prints."""
    rows = "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())
    return f"usage: rlhf-jax COMMAND [flags]\n\n{rows}\n\n`rlhf-jax COMMAND --help` lists a command's flags."


def fail(message: str) -> int:
    """Prints a user's mistake; returns the exit code for it."""
    print(f"rlhf-jax: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    sys.exit(run(arguments[0], arguments[1:]))


def run(name: str, arguments: list[str]) -> int:
    """Runs one command; returns its exit code."""
    from rlhf_jax.errors import UserError, nearest

    if name not in COMMANDS:
        return fail(f"{name!r} is not a command{nearest(name, COMMANDS)}")
    _environment()
    from absl import flags, logging

    from rlhf_jax.cli.configs import check_overrides

    command = importlib.import_module(f"rlhf_jax.cli.{name}")
    if {"-h", "--help", "-help"} & set(arguments):
        print(command.__doc__.strip() + "\n\nflags:\n" + _flag_help(command.FLAGS_HELP))
        return 0
    logging.set_verbosity(logging.WARNING)
    try:
        check_overrides(arguments)
        rest = flags.FLAGS([f"rlhf-jax {name}", *arguments])[1:]
        if rest:
            return fail(f"{name}: {rest[0]!r} is no flag: flags start with --")
        return command.main() or 0
    except UserError as error:
        return fail(str(error))
    except flags.Error as error:
        return fail(f"{name}: {error}")
    except KeyboardInterrupt:
        print("rlhf-jax: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _flag_help(rows: dict[str, str]) -> str:
    return "\n".join(f"  {flag}\n      {text}" for flag, text in rows.items())


def _environment() -> None:
    """Defaults that must be set before JAX is imported: a compilation cache that later runs reuse, and no banner from the TPU probe."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlhf_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


if __name__ == "__main__":
    main()
