"""`rlhf-jax COMMAND [flags]`: finds the command's file, parses its flags, and turns a user's mistake into one sentence.

Exit codes, named in `errors`: 0 done, 2 a mistake of the user's (config, data, checkpoint, flags), 75 preempted with the state saved, 76 ended by
config.run.watchdog, 1 anything else. `launch` goes by them: it restarts what was preempted, stops at a mistake, and restarts a crash a few times.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from rlhf_jax.errors import MISTAKE

COMMANDS = {
    "train": "train any objective: SFT, reward model, DPO, PPO, GRPO …, or resume a run",
    "sample": "complete prompts with a trained policy",
    "chat": "talk with a policy in a terminal",
    "score": "log-probs of every token under a policy, or a reward model's scores, for rows of a file",
    "convert": "a Hugging Face directory to a checkpoint of ours and back",
    "compile": "whether a run fits a TPU slice and what bounds it, by the TPU's compiler, without one",
    "objectives": "list the objectives, or show one with its equation and hyper-parameters",
    "eval": "evaluate a trained policy or reward model on held-out data",
    "launch": "train on Cloud TPU: print the plan of a run, start it, watch it, stop it",
}


def usage() -> str:
    """What `rlhf-jax --help` prints."""
    rows = "\n".join(f"  {name:<11}{text}" for name, text in COMMANDS.items())
    return f"usage: rlhf-jax COMMAND [flags]\n\n{rows}\n\n`rlhf-jax COMMAND --help` lists a command's flags."


def fail(message: str) -> int:
    """Prints a user's mistake; returns the exit code for it."""
    print(f"rlhf-jax: {' '.join(message.split())}", file=sys.stderr)
    return MISTAKE


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `rlhf-jax`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    prepare_process()
    sys.exit(run(arguments[0], arguments[1:]))


def script(body: Callable[[list[str]], int | None]) -> None:
    """Entry point of a pipeline in experiments/: parses the flags it defined and runs it like a command."""
    prepare_process()
    sys.exit(guarded(sys.argv[0], sys.argv[1:], body))


def run(name: str, arguments: list[str]) -> int:
    """Runs one command; returns its exit code."""
    from rlhf_jax.errors import nearest

    if name not in COMMANDS:
        return fail(f"{name!r} is not a command{nearest(name, COMMANDS)}")
    command = importlib.import_module(f"rlhf_jax.cli.{name}")
    if {"-h", "--help", "-help"} & set(arguments):
        print((command.__doc__ or "").strip() + "\n\nflags:\n" + _flag_help(command.FLAGS_HELP))
        return 0
    operands = getattr(command, "OPERANDS", 0)
    return guarded(name, arguments, lambda rest: command.main(rest[1:]) if operands else command.main(), operands)


def guarded(name: str, arguments: list[str], body: Callable[[list[str]], int | None], operands: int = 0) -> int:
    """Parses flags and runs `body`; a user's mistake becomes one sentence and exit code 2.

    Args:
      name: of the command, for messages.
      arguments: the command line after it.
      body: gets the name and what is left beside the flags.
      operands: how many words besides flags are legal.
    """
    from absl import flags, logging

    from rlhf_jax.cli.configs import check_overrides
    from rlhf_jax.errors import UserError

    logging.set_verbosity(logging.WARNING)
    if os.getcwd() not in sys.path:  # a user's objectives, rewards and config helpers lie where the command is run
        sys.path.append(os.getcwd())
    try:
        check_overrides(arguments)
        rest = _parse(name, arguments)
        if len(rest) > operands:
            return fail(f"{name}: {rest[operands]!r} is no flag: flags start with --")
        return body([name, *rest]) or 0
    except UserError as error:
        return fail(str(error))
    except flags.Error as error:
        return fail(f"{name}: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        return fail(f"{name}: {error.filename}: {error.strerror}; choose another path, or make this one readable and writable")
    except KeyboardInterrupt:
        print("rlhf-jax: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _parse(name: str, arguments: list[str]) -> list[str]:
    """Parses the flags; returns what is none. `config_flags` looks for --config.KEY=VALUE in sys.argv, whoever calls."""
    from absl import flags

    before, sys.argv = sys.argv, [name, *arguments]
    try:
        return flags.FLAGS(sys.argv)[1:]
    finally:
        sys.argv = before


def _flag_help(rows: dict[str, str]) -> str:
    return "\n".join(f"  {flag}\n      {text}" for flag, text in rows.items())


def prepare_process() -> None:
    """Sets what must be set before JAX is imported, unless the user has: a compilation cache that later runs reuse, and on Linux
    transparent huge pages for malloc, which halve the time of a training step on CPU (BUILD_NOTES.md) and are read at process start only,
    so that the process replaces itself once."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlhf_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if importlib.util.find_spec("libtpu") and not any(glob.glob(f"/dev/{name}[0-9]*") for name in ("accel", "vfio/", "nvidia")):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the TPU's compiler is here without a TPU, which JAX would go looking for
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    main()
