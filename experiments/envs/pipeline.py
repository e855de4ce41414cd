"""Policies that learn to use a calculator and to halve: SFT on demonstrations that are mostly flawed, then GRPO on the environments.

    python experiments/envs/pipeline.py --workdir runs/envs

Writes results.json and curves.svg there, and prints the table of README.md. Stages are configs of configs/ with their `:demo` values; those that are
done are not done again.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import matplotlib
from absl import flags
from matplotlib.figure import Figure

from rlhf_jax import envs
from rlhf_jax.cli.configs import load_config
from rlhf_jax.envs.tasks import SIZES
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.files import write_whole
from rlhf_jax.report.curves import read_series
from rlhf_jax.report.table import spread
from rlhf_jax.train.assemble import assemble
from rlhf_jax.train.config import check
from rlhf_jax.train.loop import train
from rlhf_jax.train.programs import Programs

ROOT = pathlib.Path(__file__).resolve().parents[2]
SFT_STEPS = {"calculator": 300, "guess": 120}  # until the turns have their form; the flaws are learnt as well
METRICS = ("eval/objective/score", "eval/rollout/truncated", "eval/rollout/length")
COLOURS = ("#8792A5", "#16936F")

flags.DEFINE_string("workdir", "runs/envs", "where everything goes")
flags.DEFINE_list("tasks", list(SIZES), "embedded environments")
flags.DEFINE_list("seeds", ["0", "1"], "of data, parameters and episodes")
flags.DEFINE_float("scale", 1.0, "share of the steps: 0.1 is a quick look", lower_bound=0.001, upper_bound=1.0)


def config_of(task: str, stage: str, folder: pathlib.Path, files: dict[str, str], seed: int, scale: float) -> Any:
    """A stage's config: `sft`, or `grpo`, whose model both have."""
    grpo = load_config(f"{ROOT}/configs/grpo_{task}.py:demo")
    config = grpo if stage == "grpo" else load_config(f"{ROOT}/configs/sft.py:demo")
    config.seed, config.data.cache, config.data.train = seed, str(folder / "cache"), files["rl" if stage == "grpo" else "sft"]
    if stage == "grpo":
        config.init_from, config.data.valid = str(folder / "sft"), files["valid"]
    else:
        config.model.context = config.data.max_length = grpo.model.context
        config.run.update(steps=SFT_STEPS[task], batch_size=32)
        config.validation.every = 0
    config.run.steps = max(int(config.run.steps * scale), 2)
    return config


def measured(task: str, stage: str, folder: pathlib.Path, files: dict[str, str], seed: int) -> dict[str, float]:
    """A stage's checkpoint on the test prompts, one episode each."""
    config = config_of(task, "grpo", folder, files, seed, 1.0)
    config.init_from, config.data.valid = str(folder / stage), files["test"]
    config.run.batch_size = 128
    exp = assemble(*check(config))
    found = Programs(exp).validate(exp.start.state())
    return {name: float(found[name].compute()) for name in METRICS}


def kept(folder: pathlib.Path, scale: float) -> dict[str, Any] | None:
    """What `one` found before in this folder, if it did.

    Raises:
      UserError: it was done on another scale.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if (before := found.get("scale", 1.0)) != scale:  # whole runs did not always say so
        raise UserError(f"--scale = {scale:g}: {path} is of --scale={before:g}; choose another --workdir")
    return found


def one(task: str, folder: pathlib.Path, seed: int, scale: float) -> dict[str, Any]:
    """Both stages of a task under a seed, and what they are worth."""
    if (before := kept(folder, scale)) is not None:
        return before
    files, found = envs.write_task(task, folder / "data", seed=seed), {"scale": scale}
    for stage in ("sft", "grpo"):
        print(f"— {task}, seed {seed}: {stage}", flush=True)
        begin = time.time()
        train(config_of(task, stage, folder, files, seed, scale), str(folder / stage))
        found[stage] = {"seconds": time.time() - begin, **measured(task, stage, folder, files, seed)}
    steps, scores = read_series(folder / "grpo" / "metrics.jsonl")["objective/score"]
    found["curve"] = {"steps": [int(step) for step in steps], "scores": [float(score) for score in scores]}
    write_whole(folder / "result.json", json.dumps(found) + "\n")
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and deviation over seeds, in Markdown."""
    lines = ["| task | stage | score | truncated | own tokens per episode |", "|---|---|---|---|---|"]
    for (task, runs), stage in itertools.product(results.items(), ("sft", "grpo")):
        columns = [[run[stage][name] for run in runs] for name in METRICS]
        cells = [spread(column) for column in columns]
        lines.append(f"| {task} | {stage.upper()} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(results: dict[str, list[dict[str, Any]]]) -> Figure:
    """The score of every iteration's episodes, a line per seed; SFT and GRPO on the test prompts at both ends."""
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    axes: Iterator[Any] = iter(figure.subplots(1, len(results), squeeze=False)[0])
    for axis, (task, runs) in zip(axes, results.items()):
        for run in runs:
            axis.plot(run["curve"]["steps"], run["curve"]["scores"], color=COLOURS[1], linewidth=1.2, alpha=0.6)
        ends = ((0, "sft", COLOURS[0]), (runs[0]["curve"]["steps"][-1] + 1, "grpo", COLOURS[1]))
        for x, stage, colour in ends:
            axis.plot([x] * len(runs), [run[stage][METRICS[0]] for run in runs], "o", color=colour, label=f"{stage.upper()}, test")
        axis.set(title=task, xlabel="iteration of GRPO", ylim=(0, 1.05))
        axis.grid(color="#E9ECF1")
        axis.legend(frameon=False, loc="lower right", fontsize=8)
    return figure


def main(argv: list[str]) -> None:
    """Runs the pipeline."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"{argv[1]!r} is no flag: flags start with --")
    for task in options.tasks:
        if task not in SIZES:
            raise UserError(f"--tasks has {task!r}, which is no embedded environment{nearest(task, SIZES)}")
    if not all(seed.isdecimal() for seed in options.seeds):
        raise UserError(f"--seeds = {options.seeds}: must be whole numbers, e.g. 0,1,2")
    folder = pathlib.Path(options.workdir)
    for task, seed in itertools.product(options.tasks, options.seeds):
        kept(folder / f"{task}_{seed}", options.scale)  # before hours of training
    results = {
        task: [one(task, folder / f"{task}_{seed}", int(seed), options.scale) for seed in options.seeds] for task in options.tasks
    }
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    with matplotlib.rc_context({"svg.hashsalt": "rlhf_jax"}):  # the same file for the same numbers
        picture(results).savefig(folder / "curves.svg", metadata={"Date": None})
    print("\n" + table(results))


if __name__ == "__main__":
    from rlhf_jax.cli.main import script

    script(main)
