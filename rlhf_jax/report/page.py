"""The report: one HTML file with the result in a sentence, the table, the pictures, samples side by side, the configs and the versions.

Flow: the results are validated, the pictures drawn, everything handed to a jinja template with autoescape on (samples are model output and
may hold markup), and the page is written whole or not at all. It refers to nothing outside itself, so it can be mailed or archived.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2

from rlhf_jax.files import write_whole
from rlhf_jax.report import curves, samples
from rlhf_jax.report.results import POLICY_STAGES, STAGES, TITLES, validate

_TEMPLATE = pathlib.Path(__file__).with_name("page.html.jinja")
_SAMPLES = 12  # per task; more do not help a reader


def write_report(results: dict[str, Any], runs: Mapping[str, str | os.PathLike], path: str | os.PathLike) -> None:
    """Write the self-contained page.

    Args:
      results: a results document.
      runs: "stage" or "task/stage" -> working folder with its metrics.jsonl; a plain stage belongs to the only task.
      path: report.html; its folder is made.

    Raises:
      UserError: results that are not valid; nothing is written then.
      ValueError: a run of a stage or task that does not exist.
    """
    validate(results)
    write_whole(path, render(results, runs))


def render(results: dict[str, Any], runs: Mapping[str, str | os.PathLike]) -> str:
    """The page as text; arguments as `write_report`."""
    tasks = results["tasks"]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    policies = {task: stages for task, stages in tasks.items() if any(stage in stages for stage in POLICY_STAGES)}
    aligned = {task: stages for task, stages in policies.items() if any(s in stages for s in POLICY_STAGES if s != "sft")}
    drawn = {task: curves.training_curves(by_stage) for task, by_stage in _runs_by_task(tasks, runs).items()}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        headlines=[headline(task, stages) for task, stages in tasks.items()],
        tasks=[_task(task, stages) for task, stages in tasks.items()],
        gold=curves.gold_bars(policies) if policies else None,
        wins=curves.win_rates(aligned) if aligned else None,
        frontier=curves.frontier(policies) if policies else None,
        curves={task: picture for task, picture in drawn.items() if picture},
        said={name: found for name, workdir in runs.items() if (found := samples.sampled(workdir))},
        configs={name: _text(config) for name, config in results["configs"].items()},
        versions=results["versions"],
    )


def headline(task: str, stages: Mapping[str, Any]) -> str:
    """The task's result in a sentence or two, and no more than the intervals allow."""
    names = [stage for stage in POLICY_STAGES if stage not in ("sft", "grpo_gold") and stage in stages]
    better = [stage for stage in names if stages[stage]["win_ci95"][0] > 0.5]
    rest = [stage for stage in names if stage not in better]
    parts = []
    if better:
        verb = "beats" if len(better) == 1 else "each beat" if len(better) > 2 else "both beat"
        rates = _listed([f"{100 * stages[stage]['win_vs_sft']:.0f} %" for stage in better])
        parts.append(f"{_listed([TITLES[s] for s in better])} {verb} SFT on held-out prompts (win rate{'s' * (len(better) > 1)} {rates})")
    for stage in rest:
        low, high = stages[stage]["win_ci95"]
        verdict = "loses to SFT" if high < 0.5 else "is not told apart from SFT"
        parts.append(f"{TITLES[stage]} {verdict} ({100 * low:.0f}–{100 * high:.0f} % wins)")
    if "sft" in stages and better:
        best = max(better, key=lambda stage: stages[stage]["gold_sample"])
        parts.append(f"sampled gold rises from {stages['sft']['gold_sample']:.2f} to {stages[best]['gold_sample']:.2f} with {TITLES[best]}")
    if "grpo_gold" in stages:
        parts.append(f"trained on the verifiable gold itself, GRPO reaches {stages['grpo_gold']['gold_sample']:.2f}")
    if not parts and "rm" in stages:
        parts.append(f"the reward model agrees with gold on {100 * stages['rm']['accuracy']:.0f} % of pairs")
    elif not parts:
        parts.append(f"SFT reaches a gold of {stages['sft']['gold_sample']:.2f}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _task(task: str, stages: Mapping[str, Any]) -> dict[str, Any]:
    samples = stages.get("samples", [])[:_SAMPLES]
    answering = [stage for stage in POLICY_STAGES if any(stage in sample for sample in samples)]
    return {
        "name": task,
        "rows": [row for stage in STAGES if stage in stages for row in _rows(stage, stages[stage])],
        "stages": [(stage, TITLES[stage], curves.COLOURS[stage]) for stage in answering],
        "samples": samples,
    }


def _rows(stage: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    first = {"stage": stage, "title": TITLES[stage], "colour": curves.COLOURS[stage], **values, "final": False}
    if "final" not in values:
        return [first]
    return [first, {**first, "seconds": None, **values["final"], "final": True}]


def _runs_by_task(tasks: Mapping[str, Any], runs: Mapping[str, str | os.PathLike]) -> dict[str, dict[str, str | os.PathLike]]:
    grouped: dict[str, dict[str, str | os.PathLike]] = {}
    for name, workdir in runs.items():
        task, _, stage = name.rpartition("/")
        if not task and len(tasks) == 1:
            task = next(iter(tasks))
        if task not in tasks or stage not in STAGES:
            raise ValueError(f"report: run {name!r} is not <task>/<stage> of the tasks {sorted(tasks)} and the stages {', '.join(STAGES)}")
        grouped.setdefault(task, {})[stage] = workdir
    return grouped


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _text(config: str | dict[str, Any]) -> str:
    return config if isinstance(config, str) else json.dumps(config, indent=2, ensure_ascii=False)
