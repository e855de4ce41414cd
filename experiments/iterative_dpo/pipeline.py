"""Iterative DPO on the embedded tasks: three rounds of sample → label → DPO, each from the policy of the round before.

    python experiments/iterative_dpo/pipeline.py --seeds 0,1,2 --workdir runs/iterative_dpo --results experiments/iterative_dpo

A round samples the current policy on prompts of its own third of the RL split, labels pairs with the demo's noisy Bradley-Terry draw on gold, and
trains DPO (configs/dpo.py:demo) from the current policy, which is also the reference. Beside it stands what the same steps are worth without new
samples: DPO going on over the first round's pairs. What is done is not done again. Writes rounds.json and rounds.svg, and prints the README's table.
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

from rlhf_jax.cli.main import script  # noqa: E402
from rlhf_jax.errors import UserError  # noqa: E402
from rlhf_jax.eval import compare  # noqa: E402
from rlhf_jax.files import write_whole  # noqa: E402
from rlhf_jax.report import curves  # noqa: E402
from rlhf_jax.report.table import spread  # noqa: E402

ROUNDS = 3
WAYS = {"new": "new samples each round", "same": "the first round's pairs again"}

for unused in ("seed", "stages"):  # of the demo
    delattr(flags.FLAGS, unused)
flags.DEFINE_list("seeds", ["0", "1", "2"], "of data, training and evaluation")
flags.DEFINE_string("results", "", "folder of the numbers and pictures; default the workdir")


def thirds(task: demo.Task) -> list[str]:
    """The RL split's prompts in as many files as there are rounds; their names become splits of the task."""
    lines = pathlib.Path(task.files["rl"]).read_text().splitlines(keepends=True)
    names = [f"rl_{number}" for number in range(ROUNDS)]
    for number, name in enumerate(names):
        task.files[name] = str(task.folder / "data" / f"{name}_prompts.jsonl")
        write_whole(task.files[name], "".join(lines[number::ROUNDS]))
    return names


def run(task: demo.Task, way: str) -> list[dict[str, float]]:
    """Gold after each round, the SFT policy first: [{round, gold, kl, flips}]."""
    splits, policy = thirds(task), "sft"
    rows = [judged(task, "sft", 0, 0.0)]
    for number, split in enumerate(splits, start=1):
        stage = f"dpo_{way}_{number}" if number > 1 else "dpo_1"
        folder = task.folder / "rounds" / (stage if way == "new" or number == 1 else "dpo_1")
        if not (folder / "audit.json").exists():
            task.label(policy, split, folder, task.seed + 100 * number)
        demo.CONFIG[stage] = "dpo"
        task.train(stage, init_from=task.path(policy), data__train=str(folder / "train.jsonl"), data__valid=str(folder / "valid.jsonl"))
        audit = json.loads((folder / "audit.json").read_text())
        policy = stage
        rows.append(judged(task, stage, number, audit["flip_share"]))
    return rows


def judged(task: demo.Task, stage: str, number: int, flips: float) -> dict[str, float]:
    """Gold of a stage's last checkpoint on the test prompts, remembered."""
    kept = task.folder / "rounds" / f"{stage}.json"
    if not kept.exists():
        found = compare.row(task.evaluate(stage, "test"), None)
        write_whole(kept, json.dumps({"round": number, "gold": found["gold_sample"], "kl": found["seq_kl"], "flips": flips}) + "\n")
    return json.loads(kept.read_text())


def table(name: str, ways: dict[str, list[list[dict[str, float]]]]) -> str:
    """A Markdown table of one task: gold after each round and its gain over the round before, mean ± standard deviation over the seeds."""
    lines = [f"**{name}**", "", f"| | SFT | {' | '.join(f'round {n + 1}' for n in range(ROUNDS))} |", "|---|" + "---|" * (ROUNDS + 1)]

    for way, runs in ways.items():
        lines.append(f"| {WAYS[way]}: gold | {' | '.join(spread([run[n]['gold'] for run in runs]) for n in range(ROUNDS + 1))} |")
        gains = [spread([run[n]["gold"] - run[n - 1]["gold"] for run in runs], sign="+") for n in range(1, ROUNDS + 1)]
        lines.append(f"| gain of the round |  | {' | '.join(gains)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs everything and draws it."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"{argv[1]!r} is no flag: flags start with --")
    found: dict[str, dict[str, list[list[dict[str, Any]]]]] = {}
    for task in demo.tasks_by_seed(options.workdir, options.tasks, options.seeds, options.scale):
        train_file, valid_file = task.split_demonstrations()
        task.train("sft", data__train=train_file, data__valid=valid_file)
        for way in WAYS:
            found.setdefault(task.name, {}).setdefault(way, []).append(run(task, way))
    results = pathlib.Path(options.results or options.workdir)
    for name, ways in found.items():
        print("\n" + table(name, ways))
    write_whole(results / "rounds.json", json.dumps(found, indent=1) + "\n")
    points = {
        name: {WAYS[way]: [[(row["round"], row["gold"]) for row in run] for run in runs] for way, runs in ways.items()}
        for name, ways in found.items()
    }
    picture = curves.lines(points, x="round", y="gold on the test split, sampled")
    curves.save(picture, results / "rounds.svg")


if __name__ == "__main__":
    script(main)
