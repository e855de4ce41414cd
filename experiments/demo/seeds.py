"""The demo over several seeds: runs pipeline.py for each (what is done is not done again), then the table of means and spreads.

    python experiments/demo/seeds.py --seeds 0,1,2 --workdir runs/seeds

Writes experiments/demo/seeds.json (every number), gold.svg (the picture of the README) and prints the table of experiments/demo/README.md.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from absl import flags

from rlhf_jax.cli.main import script
from rlhf_jax.errors import UserError
from rlhf_jax.files import write_whole
from rlhf_jax.report import curves
from rlhf_jax.report.results import POLICY_STAGES, TITLES, read_results
from rlhf_jax.report.table import spread

HERE = pathlib.Path(__file__).resolve().parent

flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of data, training and evaluation")
flags.DEFINE_string("workdir", "runs/seeds", "one folder per seed goes in here")


def table(task: str, runs: list[dict[str, Any]]) -> str:
    """A Markdown table of one task over its seeds: chosen checkpoints, and in brackets the final ones' sampled gold."""
    lines = [f"**{task}**", "", "| stage | gold, greedy | gold, sampled | final, sampled | win rate against SFT | lowest 95 % bound | KL, nats |",
             "|---|---|---|---|---|---|---|"]
    for stage in POLICY_STAGES:
        rows = [run[stage] for run in runs]
        get = lambda name: [row[name] for row in rows]  # noqa: B023, E731
        final = "" if stage == "sft" else spread([row["final"]["gold_sample"] for row in rows])
        wins = "" if stage == "sft" else spread(get("win_vs_sft"))
        bound = "" if stage == "sft" else f"{min(row['win_ci95'][0] for row in rows):.3f}"
        lines.append(f"| {TITLES[stage]} | {spread(get('gold_greedy'))} | {spread(get('gold_sample'))} | {final} | {wins} | {bound} | "
                     f"{spread(get('seq_kl'), 2)} |")
    accuracy, length = ([run["rm"][name] for run in runs] for name in ("accuracy", "length_baseline"))
    lines += ["", f"Reward model against clean gold: {spread(accuracy)}; a length-only rule {spread(length)}."]
    return "\n".join(lines)


def averaged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the bar picture needs: mean gold per stage, the seeds' range as the interval."""
    found: dict[str, Any] = {}
    for stage in POLICY_STAGES:
        found[stage] = {}
        for name in ("gold_greedy", "gold_sample"):
            values = [run[stage][name] for run in runs]
            found[stage] |= {name: statistics.mean(values), f"{name}_ci95": [min(values), max(values)]}
    return found


def main(_: list[str]) -> None:
    """Runs and summarises."""
    results = []
    for seed in flags.FLAGS.seeds:
        folder = pathlib.Path(flags.FLAGS.workdir) / f"seed{seed}"
        if not (folder / "results.json").exists():
            print(f"— seed {seed} → {folder}", flush=True)
            command = [sys.executable, str(HERE / "pipeline.py"), f"--workdir={folder}", f"--seed={seed}"]
            if subprocess.run(command, check=False).returncode:
                raise UserError(f"the demo with seed {seed} failed; its output stands above")
        results.append(read_results(folder / "results.json")["tasks"])
    by_task = {task: [result[task] for result in results] for task in results[0]}
    for task, runs in by_task.items():
        print("\n" + table(task, runs))
    kept = {task: [{k: v for k, v in run.items() if k != "samples"} for run in runs] for task, runs in by_task.items()}
    write_whole(HERE / "seeds.json", json.dumps(kept, indent=1) + "\n")
    picture = curves.gold_bars({task: averaged(runs) for task, runs in by_task.items()})
    curves.save(picture, HERE / "gold.svg")


if __name__ == "__main__":
    script(main)
