"""The main job, end to end on the embedded tasks: records → SFT → reward model → DPO, PPO, GRPO → held-out evaluation → a report.

    python experiments/demo/pipeline.py --workdir runs/demo

Each stage is a config of configs/ with its `:demo` values; this file only names their files, labels preference pairs from the SFT policy's own
samples with a noisy Bradley-Terry draw on gold, and evaluates. Stages that are done are not done again, so a killed demo goes on.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from rlhf_jax import data
from rlhf_jax.checkpoint import CHECKPOINTS
from rlhf_jax.cli.configs import load_config
from rlhf_jax.data import embedded
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.eval import compare, preference
from rlhf_jax.eval.generation import responses
from rlhf_jax.eval.models import Policy, RewardModel
from rlhf_jax.files import write_whole
from rlhf_jax.report.page import write_report
from rlhf_jax.report.results import write_results
from rlhf_jax.report.table import terminal_table
from rlhf_jax.report.versions import versions
from rlhf_jax.rewards.gold import GOLD
from rlhf_jax.saved import load_source
from rlhf_jax.synth.preferences import Samples, clean_pairs, label_pairs, write_preferences
from rlhf_jax.train.loop import train

ROOT = pathlib.Path(__file__).resolve().parents[2]
LABEL_SCALE = 8.0  # Bradley-Terry scale per unit of gold: how noisy the labeller is
SAMPLES_PER_PROMPT = 4
TEMPERATURES = (1.0, 1.5)  # of the SFT samples that are paired
PAIRS_PER_PROMPT = 3
EVAL_BATCH = 256
NEW_TOKENS = {"sort": 16, "arithmetic": 24}
PROMPT_SLOTS = 36
CONFIG = {"sft": "sft", "rm": "reward", "dpo": "dpo", "ppo": "ppo", "grpo": "grpo", "grpo_gold": "grpo"}

flags.DEFINE_string("workdir", "runs/demo", "where everything goes")
flags.DEFINE_list("tasks", ["sort", "arithmetic"], "embedded tasks")
flags.DEFINE_list("stages", ["dpo", "ppo", "grpo", "grpo_gold"], "stages after SFT and the reward model")
flags.DEFINE_integer("seed", 0, "of data, training and evaluation")
flags.DEFINE_float("scale", 1.0, "share of the steps and of the data: 0.1 is a quick look", lower_bound=0.001, upper_bound=1.0)


class Task:
    """One task's files, stages and evaluations in one folder."""

    def __init__(self, name: str, folder: pathlib.Path, seed: int, scale: float) -> None:
        self.name, self.folder, self.seed, self.scale = name, folder, seed, scale
        scaled = folder / "scale.json"
        if scaled.exists() and (before := json.loads(scaled.read_text())) != scale:
            raise UserError(f"--scale = {scale:g}: {folder} is of --scale={before:g}; choose another --workdir")
        self.gold = GOLD[name]
        sizes = {split: max(int(size * scale), 16) for split, size in embedded.SIZES[name].items()}
        self.files = embedded.write_task(name, folder / "data", sizes=sizes, seed=seed)
        write_whole(scaled, json.dumps(scale) + "\n")
        self.results: dict[str, Any] = {}
        self.configs: dict[str, Any] = {}
        self.evaluations: dict[str, compare.Evaluation] = {}

    def path(self, stage: str) -> str:
        return str(self.folder / stage)

    def train(self, stage: str, **changes: Any) -> float:
        """Trains a stage in its workdir; returns its wall-clock seconds, remembered over restarts."""
        config = load_config(f"{ROOT}/configs/{CONFIG[stage]}.py:demo")
        config.seed = self.seed
        if self.scale < 1.0:
            config.run.steps = max(int(config.run.steps * self.scale), 3)
            config.checkpoint.every = config.validation.every = max(config.run.steps // 3, 1)
        config.data.cache = str(self.folder / "cache")
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            (config[section] if section else config)[name] = value
        self.configs[f"{self.name}/{stage}"] = str(config)
        clock = pathlib.Path(self.path(stage)) / "seconds.json"
        before = json.loads(clock.read_text()) if clock.exists() else 0.0
        start = time.time()
        print(f"\n— {self.name}: {stage}", flush=True)
        train(config, self.path(stage))
        seconds = before + (time.time() - start if not before else 0.0)
        clock.write_text(json.dumps(seconds))
        return seconds

    def prompts(self, split: str, samples: int) -> Any:
        """A prompt split, `samples` rows per prompt."""
        source = self.policy("sft").source
        return data.open_dataset(
            "prompt", self.files[split], source.tokenizer, template=source.template, max_length=PROMPT_SLOTS, prompt_length=PROMPT_SLOTS,
            batch_size=EVAL_BATCH, group_size=samples, cache=self.folder / "cache",
        )

    def policy(self, stage: str, step: int | None = None) -> Policy:
        path = self.path(stage)
        return Policy(load_source(path, "--workdir", which="latest" if step is None else step), "--workdir")

    def split_demonstrations(self) -> tuple[str, str]:
        """The demonstrations, a tenth of them held out for validation."""
        lines = pathlib.Path(self.files["sft"]).read_text().splitlines(keepends=True)
        held_out = len(lines) // 10
        paths = self.folder / "data" / "sft_train.jsonl", self.folder / "data" / "sft_valid.jsonl"
        for path, part in zip(paths, (lines[held_out:], lines[:held_out]), strict=True):
            write_whole(path, "".join(part))
        return str(paths[0]), str(paths[1])

    # --- preference data ---

    def sample_pairs(self) -> Mapping[str, str]:
        """Preference files from SFT samples: noisy `train` and `valid` from the RM prompts, clean `test` from the test prompts."""
        paths = {split: str(self.folder / "pairs" / f"{split}.jsonl") for split in ("train", "valid", "test")}
        if all(pathlib.Path(path).exists() for path in paths.values()):
            return paths
        self.label("sft", "rm", self.folder / "pairs", self.seed)
        clean, _ = clean_pairs(self.samples_of("sft", "test", self.seed), self.gold, pairs_per_prompt=PAIRS_PER_PROMPT, seed=self.seed)
        if not clean:
            raise UserError(f"{self.name}: the SFT policy's samples hold no pair of different gold: train it longer (configs/sft.py:demo)")
        write_preferences(paths["test"], clean)
        return paths

    def label(self, stage: str, split: str, folder: pathlib.Path, seed: int) -> dict[str, str]:
        """Noisily labelled pairs of a policy's samples: {"train": …, "valid": …}, the latter from a tenth of the prompts; audit.json beside them."""
        paths = {name: str(folder / f"{name}.jsonl") for name in ("train", "valid")}
        noisy = self.samples_of(stage, split, seed)
        rows, audit = label_pairs(noisy, self.gold, scale=LABEL_SCALE, pairs_per_prompt=PAIRS_PER_PROMPT, seed=seed)
        if not rows:
            raise UserError(f"{self.name}: the samples of {stage!r} hold no pair of different texts")
        held_out = max(len(noisy) // 10, 1)
        write_preferences(paths["train"], (row for row in rows if row["prompt_id"] >= held_out))
        write_preferences(paths["valid"], (row for row in rows if row["prompt_id"] < held_out))
        write_whole(folder / "audit.json", json.dumps(audit.as_dict(), indent=2) + "\n")
        print(f"  {audit.pairs} pairs, {100 * audit.as_dict()['flip_share']:.0f} % labelled against gold, {audit.identical} identical skipped")
        return paths

    def samples_of(self, stage: str, split: str, seed: int) -> list[Samples]:
        """A policy's samples of every prompt, half of them at each temperature: the hotter ones hold the mistakes that a reward model must have seen,
        or RL finds that it never learnt to mind them."""
        policy, prompts = self.policy(stage), self.prompts(split, SAMPLES_PER_PROMPT // len(TEMPERATURES))
        found: dict[int, list[str]] = {}
        for batch in prompts.eval_batches():
            for number, temperature in enumerate(TEMPERATURES, start=1):
                rolled = policy.generate(batch, seed=seed + number, max_new_tokens=NEW_TOKENS[self.name], temperature=temperature)
                for row, text in enumerate(responses(rolled, policy.source.tokenizer)):
                    if batch.real[row]:
                        found.setdefault(int(batch.prompt_ids[row]), []).append(text)
        return [Samples(i, prompts.messages(i)[-1]["content"], tuple(texts)) for i, texts in sorted(found.items())]

    def reward_accuracy(self, pairs: Mapping[str, str], seconds: float) -> None:
        """The reward model against clean gold on the test prompts, beside the better of two length rules."""
        model = RewardModel(load_source(self.path("rm"), "--workdir"), "--workdir")
        dataset = data.open_dataset("preference", pairs["test"], model.source.tokenizer, template=model.source.template, max_length=64,
                                    overlong="truncate", batch_size=EVAL_BATCH, cache=self.folder / "cache")
        scores = np.concatenate([model.scores(batch)[batch.real] for batch in dataset.eval_batches()])
        lengths = {split: np.array([[len(row["chosen"]), len(row["rejected"])] for row in _rows(pairs[split])]) for split in ("train", "test")}
        baseline = preference.length_baseline(*lengths["train"].T, *lengths["test"].T)
        self.results["rm"] = {
            "accuracy": preference.accuracy(scores[:, 0], scores[:, 1]), "length_baseline": baseline.accuracy,
            "length_rule": baseline.rule, "pairs": len(scores), "seconds": seconds,
        }

    # --- evaluation ---

    def evaluate(self, stage: str, split: str, step: int | None = None) -> compare.Evaluation:
        return compare.evaluate(
            self.policy(stage, step), self.policy("sft"), self.prompts(split, 1), self.prompts(split, SAMPLES_PER_PROMPT), self.gold,
            max_new_tokens=NEW_TOKENS[self.name], temperature=1.0, seed=self.seed + 2, samples=SAMPLES_PER_PROMPT,
        )

    def report(self, stage: str, seconds: float) -> None:
        """The chosen checkpoint (best sampled gold on the validation split) and the final one, both on the test split."""
        if stage == "sft":
            self.evaluations["sft"] = self.evaluate("sft", "test")
            self.results["sft"] = {**compare.row(self.evaluations["sft"], None), "seconds": seconds}
            return
        steps = sorted(int(path.name) for path in (pathlib.Path(self.path(stage)) / CHECKPOINTS).iterdir() if path.name.isdigit())
        found = {step: compare.row(self.evaluate(stage, "valid", step), None)["gold_sample"] for step in steps}
        chosen = max(steps, key=lambda step: (found[step], -step))
        self.evaluations[stage] = self.evaluate(stage, "test", chosen)
        values = compare.row(self.evaluations[stage], self.evaluations["sft"], seed=self.seed)
        final = values if chosen == steps[-1] else compare.row(self.evaluate(stage, "test"), self.evaluations["sft"], seed=self.seed)
        self.results[stage] = {**values, "chosen_step": chosen, "valid_gold": {str(k): v for k, v in found.items()}, "seconds": seconds,
                               "final": dict(final)}

    def samples(self, count: int = 12) -> list[dict[str, Any]]:
        """The same sampled prompts under every stage."""
        first = {stage: {r["prompt_id"]: r for r in reversed(e.sampled)} for stage, e in self.evaluations.items()}
        ids = sorted(first["sft"])[:count]
        return [
            {"prompt": first["sft"][i]["prompt"],
             **{stage: {"response": rows[i]["response"], "gold": rows[i]["gold"]} for stage, rows in first.items()}}
            for i in ids
        ]


def _rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def check_names(flag: str, given: Sequence[str], known: Iterable[str]) -> None:
    """Refuses a name that a list flag does not know, before anything is trained.

    Raises:
      UserError: with the nearest known one.
    """
    for name in given:
        if name not in known:
            raise UserError(f"--{flag} has {name!r}, which it does not know{nearest(name, known)}")


def tasks_by_seed(workdir: str, names: Sequence[str], seeds: Sequence[str], scale: float) -> list[Task]:
    """The tasks of an experiment over seeds, each in a folder of its own.

    Raises:
      UserError: a seed or a task that is none, or a folder of another scale.
    """
    check_names("tasks", names, GOLD)
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds = {','.join(seeds)}: must be whole numbers, e.g. 0,1,2")
    return [Task(name, pathlib.Path(workdir) / f"seed{int(seed)}" / name, int(seed), scale) for seed in seeds for name in names]


def begin(task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
    """The SFT policy and the reward model; what stages on pairs and stages on prompts change in their configs to go on from there."""
    sft = task.path("sft")
    train_file, valid_file = task.split_demonstrations()
    seconds = task.train("sft", data__train=train_file, data__valid=valid_file)
    task.report("sft", seconds)
    pairs = task.sample_pairs()
    on_pairs = dict(init_from=sft, data__train=pairs["train"], data__valid=pairs["valid"])
    task.reward_accuracy(pairs, task.train("rm", **on_pairs))
    on_prompts = dict(init_from=sft, data__train=task.files["rl"], data__valid=task.files["valid"],
                      sampling__max_new_tokens=NEW_TOKENS[task.name])
    return on_pairs, on_prompts


def run_task(task: Task, stages: list[str], say: Callable[[str], None]) -> None:
    """All stages of one task, in order."""
    (on_pairs, on_prompts), rm = begin(task), task.path("rm")
    rewards = {
        "dpo": on_pairs,
        "ppo": {**on_prompts, "reward_from": rm},
        "grpo": {**on_prompts, "reward_from": rm},
        "grpo_gold": {**on_prompts, "reward_fn": f"rlhf_jax.rewards.gold.{task.name}_reward", "reward_normalise": False,
                      "objective__advantage_eps": 0.05},  # gold's own scale: a group deviates by about 0.3
    }
    for stage in stages:
        task.report(stage, task.train(stage, **rewards[stage]))
        say(terminal_table({"tasks": {task.name: task.results}, "versions": {}, "configs": {}}))


def main(argv: list[str]) -> None:
    """Runs the pipeline."""
    if argv[1:]:
        raise UserError(f"{argv[1]!r} is no flag: flags start with --")
    options = flags.FLAGS
    workdir, start = pathlib.Path(options.workdir), time.time()
    check_names("tasks", options.tasks, GOLD)
    check_names("stages", options.stages, [stage for stage in CONFIG if stage not in ("sft", "rm")])
    results: dict[str, Any] = {"tasks": {}, "versions": versions(), "configs": {}}
    runs = {}
    for name in options.tasks:
        task = Task(name, workdir / name, options.seed, options.scale)
        run_task(task, options.stages, lambda text: print("\n" + text, flush=True))
        results["tasks"][name] = {**task.results, "samples": task.samples()}
        results["configs"] |= task.configs
        runs |= {f"{name}/{stage}": task.path(stage) for stage in ("sft", "rm", *options.stages)}
    results["seconds"] = time.time() - start
    write_results(results, workdir / "results.json")
    write_report(results, runs, workdir / "report.html")
    print(f"\n{terminal_table(results)}\n\n{results['seconds']:.0f} s in all; {workdir}/report.html, {workdir}/results.json")


if __name__ == "__main__":
    from rlhf_jax.cli.main import script

    script(main)
