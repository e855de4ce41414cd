"""W1 for every phase, each in a process of its own; beside a peer, given its Python and scripts, the ratio of medians from one run.

    make bench
    python experiments/benchmarks/bench.py --peer_python ../venvs/tunix/bin/python --peer_scripts DIR

DIR holds sft.py, dpo.py, gen.py, grpo.py, ppo.py: those that are there are run.

A phase that a peer's script cannot run as asked (its settings are fixed, as the beta of Tunix's GRPO) is timed on our side alone.

Ours and the peer's alternate. Absolute seconds of a shared machine mean little; the ratio is the result. `--same_allocator` gives the peer our
malloc setting; without it each runs as it ships.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
from typing import Any

from absl import flags

from rlhf_jax.cli.main import script

HERE = pathlib.Path(__file__).resolve().parent
SCRIPTS = {  # of the peer, with its arguments; TRL's GRPO has no reference unless told to
    "sft": ("sft.py",), "reward": ("reward.py",), "dpo": ("dpo.py",), "generate": ("gen.py",), "ppo": ("ppo.py",), "grpo": ("grpo.py", "--beta=0.04"),
    "grpo_no_reference": ("grpo.py", "--beta=0.0"),
}

flags.DEFINE_list("phases", list(SCRIPTS), "what to time")
flags.DEFINE_integer("repeats", 2, "processes per phase and side")
flags.DEFINE_integer("steps", 16, "steps per process")
flags.DEFINE_string("peer_python", "", "the peer's interpreter")
flags.DEFINE_string("peer_scripts", "", "folder of the peer's W1 scripts")
flags.DEFINE_bool("same_allocator", True, "run the peer with our malloc setting too")
flags.DEFINE_string("output", "", "numbers as JSON")


def run(command: list[str], environment: dict[str, str]) -> dict[str, Any] | None:
    """The last JSON object that a process prints, or None if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in reversed(done.stdout.splitlines()):
        text = line.removeprefix("RESULT ")
        if text.startswith("{"):
            return json.loads(text)
    print(f"  failed: {' '.join(command)}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr)
    return None


def honours(script_text: str, arguments: list[str]) -> bool:
    """Whether a peer's script does what its arguments ask: it reads each as `flag("name", …)`, or has that value written in."""
    asked = [argument.removeprefix("--").split("=") for argument in arguments]
    return all(f'flag("{name}"' in script_text or re.search(rf"\b{name}={re.escape(value)}\b", script_text) for name, value in asked)


def seconds(result: dict[str, Any] | None) -> float | None:
    """The median step of a result line, whichever of the peers' names it has."""
    if result is None:
        return None
    return next((float(result[name]) for name in ("median_s", "median_s_per_step") if name in result), None)


def main(_: list[str]) -> None:
    """Runs all phases and prints the table."""
    options = flags.FLAGS
    peer_environment = dict(os.environ, STEPS=str(options.steps))
    if not options.same_allocator:
        peer_environment.pop("GLIBC_TUNABLES", None)
    rows = []
    print(f"{'phase':<18} {'ours s':>8} {'peer s':>8} {'ratio':>6} {'peak MiB':>9}")
    for phase in options.phases:
        ours: list[dict[str, Any] | None] = []
        theirs: list[dict[str, Any] | None] = []
        script_name, *arguments = SCRIPTS[phase]
        scripted = pathlib.Path(options.peer_scripts) / script_name
        beside = bool(options.peer_python) and scripted.exists()
        if beside and not honours(scripted.read_text(), arguments):
            beside = False
            print(f"  {scripted} does not take {' '.join(arguments)}: {phase} would compare unlike work", file=sys.stderr)
        for _repeat in range(options.repeats):
            ours.append(run([sys.executable, str(HERE / "w1.py"), f"--phase={phase}", f"--steps={options.steps}"], dict(os.environ)))
            if beside:
                theirs.append(run([options.peer_python, str(scripted), f"--steps={options.steps}", *arguments], peer_environment))
        mine, peer = ([s for s in map(seconds, side) if s is not None] for side in (ours, theirs))
        row = {"phase": phase, "ours_s": statistics.median(mine) if mine else None, "peer_s": statistics.median(peer) if peer else None}
        row["peak_rss_mib"] = max((r["peak_rss_mib"] for r in ours if r), default=None)
        row["ratio"] = round(row["peer_s"] / row["ours_s"], 2) if row["peer_s"] and row["ours_s"] else None
        rows.append(row)
        cell = lambda value, form: "–" if value is None else format(value, form)  # noqa: E731
        print(f"{phase:<18} {cell(row['ours_s'], '.4f'):>8} {cell(row['peer_s'], '.4f'):>8} {cell(row['ratio'], '.2f'):>6} "
              f"{cell(row['peak_rss_mib'], 'd'):>9}", flush=True)
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    script(main)
