"""PPO, GRPO, RLOO and Dr. GRPO on the embedded tasks: gold over training, and gold against the distance from the reference, several seeds.

    python experiments/online/pipeline.py --seeds 0,1,2 --workdir runs/online --results experiments/online

Every algorithm starts from the same SFT policy and reward model (experiments/demo) and trains on the reward model's scores with its own `:demo`
config; each checkpoint is judged by gold on the test prompts, which no training sees. What is done is not done again. Writes curves.json, gold.svg
and frontier.svg, and prints the README's table.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from absl import flags

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))

import pipeline as demo  # noqa: E402  experiments/demo/pipeline.py, whose flags --workdir, --tasks and --scale are used here

from rlhf_jax.checkpoint import CHECKPOINTS  # noqa: E402
from rlhf_jax.cli.main import script  # noqa: E402
from rlhf_jax.errors import UserError  # noqa: E402
from rlhf_jax.eval import compare  # noqa: E402
from rlhf_jax.files import write_whole  # noqa: E402
from rlhf_jax.report import curves  # noqa: E402
from rlhf_jax.report.table import spread  # noqa: E402

EVERY = 20  # updates between two checkpoints that are judged
ALGORITHMS: dict[str, dict[str, Any]] = {  # what each changes in its :demo config, so that all read the same scores
    "ppo": {},
    "grpo": {},
    "rloo": {"objective__missing_eos_penalty": 1.0, "objective__beta": 0.1},
    "dr_grpo": {"objective__missing_eos_penalty": 1.0},
}
NAMES = {"ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "dr_grpo": "Dr. GRPO"}

for unused in ("seed", "stages"):  # of the demo
    delattr(flags.FLAGS, unused)
flags.DEFINE_list("seeds", ["0", "1", "2"], "of data, training and evaluation")
flags.DEFINE_string("results", "", "folder of the numbers and pictures; default the workdir")
flags.DEFINE_list("algorithms", list(ALGORITHMS), "what to compare")


def measure(task: demo.Task, algorithm: str, on_prompts: dict[str, Any]) -> list[dict[str, float]]:
    """Trains and judges every checkpoint: [{step, gold, kl, length}], the SFT policy first."""
    kept = task.folder / "curves" / f"{algorithm}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    demo.CONFIG[algorithm] = algorithm
    own = dict(ALGORITHMS[algorithm])
    if algorithm == "dr_grpo":
        own["objective__length_scale"] = float(demo.NEW_TOKENS[task.name])
    task.train(algorithm, **on_prompts, **own, reward_from=task.path("rm"), checkpoint__every=EVERY, checkpoint__keep=100, validation__every=0)
    steps = sorted(int(path.name) for path in (pathlib.Path(task.path(algorithm)) / CHECKPOINTS).iterdir() if path.name.isdigit())
    rows = []
    for stage, step in (("sft", None), *((algorithm, step) for step in steps)):
        found = compare.row(task.evaluate(stage, "test", step), None)
        rows.append({"step": step or 0, "gold": found["gold_sample"], "kl": found["seq_kl"], "length": found["length"]})
    write_whole(kept, json.dumps(rows) + "\n")
    return rows


def table(name: str, measured: dict[str, list[list[dict[str, float]]]]) -> str:
    """A Markdown table of one task: mean ± standard deviation over the seeds. What has a star is a maximum over a run's checkpoints, which the test
    split itself chose."""
    lines = [f"**{name}**", "", "| | gold at the end | highest gold* | KL at the end, nats | highest gold at KL ≤ 1 nat* |", "|---|---|---|---|---|"]

    for algorithm, runs in measured.items():
        ends = [run[-1] for run in runs]
        near = [max(row["gold"] for row in run if row["kl"] <= 1.0) for run in runs]
        best = [max(row["gold"] for row in run) for run in runs]
        cells = [spread(values) for values in ([row["gold"] for row in ends], best, [row["kl"] for row in ends], near)]
        lines.append(f"| {NAMES[algorithm]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs everything and draws it."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"{argv[1]!r} is no flag: flags start with --")
    found: dict[str, dict[str, list[list[dict[str, float]]]]] = {}
    demo.check_names("algorithms", options.algorithms, ALGORITHMS)
    for task in demo.tasks_by_seed(options.workdir, options.tasks, options.seeds, options.scale):
        _, on_prompts = demo.begin(task)
        for algorithm in options.algorithms:
            found.setdefault(task.name, {}).setdefault(algorithm, []).append(measure(task, algorithm, on_prompts))
    results = pathlib.Path(options.results or options.workdir)
    for name, measured in found.items():
        print("\n" + table(name, measured))
    write_whole(results / "curves.json", json.dumps(found, indent=1) + "\n")
    for file, axis, label in (("gold", "step", "update"), ("frontier", "kl", "KL from the SFT policy, nats per response")):
        points = {
            name: {NAMES[a]: [[(row[axis], row["gold"]) for row in run] for run in runs] for a, runs in measured.items()}
            for name, measured in found.items()
        }
        picture = curves.lines(points, x=label, y="gold on the test split, sampled")
        curves.save(picture, results / f"{file}.svg")


if __name__ == "__main__":
    script(main)
