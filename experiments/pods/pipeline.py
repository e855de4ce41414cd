"""Which RL programs fit which TPU slice: Llama-3 shapes, compiled without a TPU.

    python experiments/pods/pipeline.py --workdir runs/pods                       all of it: hours on two cores, every cell kept as it ends
    python experiments/pods/pipeline.py --sizes 8b --lengths 4096 --objectives sft,grpo --topologies v5p:4x4x4

For every size, length, objective and slice the layouts that divide are ranked by their lower bound (rlhf_jax/compile/search.py) and compiled one
after the other until one fits, three at most. A cell that is in workdir/cells is not compiled again. Writes results.json and prints the README's
table.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
from typing import Any

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rlhf_jax.cli.main import script  # noqa: E402
from rlhf_jax.compile import chips  # noqa: E402
from rlhf_jax.errors import UserError, nearest  # noqa: E402
from rlhf_jax.files import write_whole  # noqa: E402
from rlhf_jax.launch import topologies  # noqa: E402

SIZES: dict[str, dict[str, Any]] = {
    "8b": dict(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14_336),
    "70b": dict(hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, mlp=28_672),
}
SHARED = dict(vocab_size=128_256, rope_theta=500_000.0)
OBJECTIVES = ("sft", "reward", "dpo", "ppo", "grpo")
MAIN = {"sft": "step", "reward": "step", "dpo": "step", "ppo": "iteration", "grpo": "iteration"}
LENGTHS, TOPOLOGIES = (4096, 32_768), ("v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v5p:8x8x16")
TRIES = 3
GIB = 2**30

flags.DEFINE_list("sizes", list(SIZES), "of the model")
flags.DEFINE_list("lengths", [str(length) for length in LENGTHS], "tokens of a row")
flags.DEFINE_list("objectives", list(OBJECTIVES), "what is trained")
flags.DEFINE_list("topologies", list(TOPOLOGIES), "slices")
flags.DEFINE_string("workdir", "runs/pods", "where cells are kept")
flags.DEFINE_string("results", "", "where results.json goes; empty: the workdir")


def config(objective: str, size: str, length: int, rows: int) -> Any:
    """A run of one cell: a row a chip, every parameter trained, moments in float32; PPO with critic, reference and reward model of the same size."""
    from rlhf_jax.cli.configs import load_config

    c = load_config(f"{ROOT}/configs/{objective}.py")
    c.model.update(**SIZES[size], **SHARED, context=length)
    c.tokenizer.kind = "byte"
    c.run.batch_size, c.run.microbatches = rows, 1
    if objective in ("ppo", "grpo"):
        c.run.update(epochs=1, minibatches=1)
        c.data.prompt_length = 1024
        c.sampling.max_new_tokens = length - 1024
        c.reward_from, c.reward_normalise, c.reward_fn = "reward_model", False, ""
        c.fused = True
    else:
        c.data.max_length = length
    return c


def cell(objective: str, size: str, length: int, name: str) -> dict[str, Any]:
    """The first layout that fits, or the last that was tried."""
    from rlhf_jax.compile.cache import Cache
    from rlhf_jax.compile.plan import Planner
    from rlhf_jax.train.config import check

    topology = topologies.parse(name)
    group = 8 if objective == "grpo" else 1
    checked, bound = check(config(objective, size, length, topology.chips * group), files=False)
    cache = Cache(pathlib.Path(flags.FLAGS.workdir) / "cache")
    planner = Planner(checked, bound, topology, chips.devices(topology), cache, print, (MAIN[objective],))
    tried = []
    for one in planner.ranked()[:TRIES]:
        print(f"{objective} {size} {length} {name}: {one}", flush=True)
        plan = planner.plan(one.apply(checked))
        tried.append({"layout": str(one), **plan.to_json()})
        if tried[-1]["fits"]:
            break
    best = max(tried, key=lambda row: (row["fits"], row["margin_bytes"]))
    program = best["programs"][MAIN[objective]]
    return {"objective": objective, "size": size, "length": length, "topology": name, "layout": best["layout"], "tried": len(tried),
            **{key: best[key] for key in ("fits", "margin_bytes", "peak_bytes", "lower_bound_seconds")},
            **{key: program[key] for key in ("args_bytes", "temp_bytes", "compile_seconds")}, "bound": program.get("bound", "")}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, a row per cell."""
    lines = ["| model | tokens | objective | slice | fits | free of a chip, GiB | temporaries, GiB | layout | bound, s | by | compile, s |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        seconds = row["lower_bound_seconds"]
        lines.append(f"| {row['size'].upper()} | {row['length']} | {row['objective']} | {row['topology']} | {'yes' if row['fits'] else '**no**'} | "
                     f"{row['margin_bytes'] / GIB:.1f} | {row['temp_bytes'] / GIB:.1f} | {row['layout']} | "
                     f"{'–' if seconds is None else f'{seconds:.2f}'} | {row['bound'] or '–'} | {row['compile_seconds']:.0f} |")
    return "\n".join(lines)


def main(_: list[str]) -> None:
    options = flags.FLAGS
    for given, legal in ((options.sizes, SIZES), (options.objectives, OBJECTIVES)):
        for name in given:
            if name not in legal:
                raise UserError(f"{name!r} is none of {', '.join(legal)}{nearest(name, legal)}")
    if bad := [length for length in options.lengths if not length.isdigit() or int(length) <= 1024]:
        raise UserError(f"--lengths {bad[0]}: a number of tokens above 1024, which prompts take")
    for name in options.topologies:
        chips.prepare(topologies.parse(name))
    folder, found = pathlib.Path(options.workdir) / "cells", []
    for length, size, objective, name in itertools.product(options.lengths, options.sizes, options.objectives, options.topologies):
        path = folder / f"{size}-{length}-{objective}-{name.replace(':', '-')}.json"
        if not path.exists():
            write_whole(path, json.dumps(cell(objective, size, int(length), name), indent=1) + "\n")
        found.append(json.loads(path.read_text()))
    write_whole(pathlib.Path(options.results or options.workdir) / "results.json", json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    script(main)
