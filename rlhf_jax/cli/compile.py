"""Compiles every program of a run for a TPU topology that is not here, with the TPU's own compiler, and says whether it fits and what bounds it.

  rlhf-jax compile --config configs/llama3_8b_sft.py --topology v5p:4x4x4
  rlhf-jax compile --config configs/ppo.py --topology v5e:4x4 --search --json plan.json --picture plan.svg

Needs no TPU, no data and no checkpoint; what the config names and is not here is stood in for, and said. Exit code 3: it does not fit.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

from absl import flags

from rlhf_jax.cli.configs import define_config, loaded_config

FLAGS_HELP = {
    "--config FILE[:VARIANT]": "as for `rlhf-jax train`; data and checkpoints need not be here",
    "--config.SECTION.KEY=VALUE": "overrides one value, e.g. --config.mesh.tensor=4",
    "--topology CHIP:AxBxC": "the slice, e.g. v5e:4x4, v6e:16x16, v5p:4x4x4",
    "--programs A,B": "these programs only, e.g. step, iteration, prefill, decode, update; default: all",
    "--[no]search": "try the mesh shapes, microbatches and remat that divide, compile the best, and print them",
    "--best N": "how many layouts --search compiles (3)",
    "--json FILE": "write everything as JSON; - prints it in the place of the tables",
    "--picture FILE.svg": "write memory by part and time by phase as a picture",
    "--[no]cache": "keep measurements by the hash of the program, and reuse them (on)",
}
TOO_LARGE = 3

define_config()
flags.DEFINE_string("topology", "", "the slice")
flags.DEFINE_list("programs", [], "these only")
flags.DEFINE_bool("search", False, "try other layouts")
flags.DEFINE_integer("best", 3, "layouts that --search compiles", lower_bound=1)
flags.DEFINE_string("json", "", "write JSON here")
flags.DEFINE_string("picture", "", "write a picture here")
flags.DEFINE_bool("cache", True, "reuse measurements")


def main() -> int:
    """Runs the command on parsed flags."""
    from rlhf_jax.compile import chips
    from rlhf_jax.errors import UserError
    from rlhf_jax.launch import topologies

    config, options = loaded_config(), flags.FLAGS
    if not options.topology:
        raise UserError("--topology is missing: name the slice to compile for, e.g. --topology v5e:4x4")
    topology = topologies.parse(options.topology)
    chips.prepare(topology)

    from rlhf_jax.compile import tables
    from rlhf_jax.compile.cache import Cache
    from rlhf_jax.compile.plan import Planner
    from rlhf_jax.report import curves
    from rlhf_jax.train.config import check

    checked, objective = check(config, files=False)
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlhf_jax" / "compile"
    planner = Planner(checked, objective, topology, chips.devices(topology), Cache(home if options.cache else None), _say, tuple(options.programs))
    tried = planner.search(options.best) if options.search else []
    plan = tried[0][1] if tried else planner.plan()
    if options.json == "-":
        print(json.dumps(plan.to_json(), indent=1))
    else:
        for note in plan.notes:
            print(f"note: {note}")
        for number, (candidate, other) in enumerate(tried, 1):
            print(f"{number}. {candidate}: {tables.verdict(other.found)}")
        print(f"\n{topology.name}, {topology.chips} chips, mesh {dict(plan.mesh)}: {tables.verdict(plan.found)}\n")
        print(tables.table(plan.found))
        print(f"\n{tables.LEGEND}\n")
        print(tables.collectives(plan.found))
        for one in plan.found:
            if one.refused:
                print(f"\n{one.name}, the largest of what did not fit:\n{tables.refusal(one)}")
    if options.json not in ("", "-"):
        pathlib.Path(options.json).write_text(json.dumps(plan.to_json(), indent=1) + "\n")
    if options.picture:
        curves.save(tables.picture(plan.found, topology.name), options.picture)
    fits = all(one.fits for one in plan.found)
    if not fits and not options.search:
        print("\nit does not fit: `--search` tries the layouts that divide, and says which of them do", file=sys.stderr)
    return 0 if fits else TOO_LARGE


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
