"""The results of a pipeline as one JSON document: its schema, checked when written and when read.

    tasks.<task>.<stage>      of sft, dpo, ppo, grpo, grpo_gold, for the checkpoint chosen on the validation split:
        gold_greedy, gold_sample   mean gold on the test split, [0, 1]
        win_vs_sft, win_ci95       win rate against SFT with ties ½, and its 95 % interval [low, high]; null for sft alone
        seq_kl                     nats per sequence from the reference
        seconds                    wall clock of the stage
        gold_greedy_ci95, gold_sample_ci95   optional intervals
        final                      optional: the same keys (seconds aside) for the last checkpoint
    tasks.<task>.rm           accuracy and length_baseline against clean gold, [0, 1]; seconds
    tasks.<task>.samples      optional list of {prompt, <stage>: {response, gold}}
    versions, configs         {name: text}, {name: text or object}

Further keys may stand beside these, if they are JSON without NaN or infinities.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

from rlhf_jax.errors import UserError, nearest
from rlhf_jax.files import write_whole

STAGES = ("sft", "rm", "dpo", "ppo", "grpo", "grpo_gold")
POLICY_STAGES = tuple(stage for stage in STAGES if stage != "rm")
TITLES = {"sft": "SFT", "rm": "RM", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO", "grpo_gold": "GRPO on gold"}


def validate(results: dict[str, Any]) -> None:
    """Check the document against the schema above.

    Args:
      results: the parsed document.

    Raises:
      UserError: the first key that is missing or wrong, by its full path.
    """
    _is_object(results, "results")
    for name in ("tasks", "versions", "configs"):
        _is_object(_member(results, name, "results"), name)
    if not results["tasks"]:
        raise UserError("results: tasks is empty; at least one task is needed")
    for task, stages in results["tasks"].items():
        where = f"tasks.{task}"
        _is_object(stages, where)
        if not any(stage in stages for stage in STAGES):
            raise UserError(f"results: {where} holds no stage; it needs at least one of {', '.join(STAGES)}")
        for stage, values in stages.items():
            if stage == "samples":
                _check_samples(values, f"{where}.samples")
            elif stage not in STAGES:
                raise UserError(f"results: {where}.{stage} is not a stage{nearest(stage, (*STAGES, 'samples'))}")
            else:
                _check_stage(stage, values, f"{where}.{stage}")
    for name, value in results["versions"].items():
        if not isinstance(value, str):
            raise UserError(f"results: versions.{name} is {value!r}; expected text")
    for name, value in results["configs"].items():
        if not isinstance(value, str | dict):
            raise UserError(f"results: configs.{name} is {value!r}; expected text or an object")
    _check_json(results, "results")


def write_results(results: dict[str, Any], path: str | os.PathLike) -> None:
    """Validate, then write as JSON, whole or not at all.

    Args:
      results: as the schema has it.
      path: results.json; its folder is made.

    Raises:
      UserError: as `validate`; nothing is written then.
    """
    validate(results)
    write_whole(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """Read and validate results.json.

    Raises:
      UserError: no such file, not JSON, or as `validate`.
    """
    path = pathlib.Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the pipeline first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it again with the pipeline") from None
    validate(results)
    return results


def _check_stage(stage: str, values: Any, where: str) -> None:
    _is_object(values, where)
    _number(values, "seconds", where, low=0.0)
    if stage == "rm":
        for name in ("accuracy", "length_baseline"):
            _number(values, name, where, low=0.0, high=1.0)
        return
    _check_evaluation(stage, values, where)
    if "final" in values:
        _is_object(values["final"], f"{where}.final")
        _check_evaluation(stage, values["final"], f"{where}.final")


def _check_evaluation(stage: str, values: dict[str, Any], where: str) -> None:
    for name in ("gold_greedy", "gold_sample"):
        _number(values, name, where, low=0.0, high=1.0)
        if f"{name}_ci95" in values:
            _interval(values, f"{name}_ci95", where)
    _number(values, "seq_kl", where)
    itself = stage == "sft"
    if not (itself and _member(values, "win_vs_sft", where) is None):
        _number(values, "win_vs_sft", where, low=0.0, high=1.0)
    if not (itself and _member(values, "win_ci95", where) is None):
        _interval(values, "win_ci95", where)


def _check_samples(samples: Any, where: str) -> None:
    if not isinstance(samples, list):
        raise UserError(f"results: {where} is {samples!r}; expected a list")
    for index, sample in enumerate(samples):
        at = f"{where}[{index}]"
        _is_object(sample, at)
        if not isinstance(_member(sample, "prompt", at), str):
            raise UserError(f"results: {at}.prompt is {sample['prompt']!r}; expected text")
        for stage, answer in sample.items():
            if stage == "prompt":
                continue
            if stage not in POLICY_STAGES:
                raise UserError(f"results: {at}.{stage} is not a stage that responds{nearest(stage, POLICY_STAGES)}")
            _is_object(answer, f"{at}.{stage}")
            if not isinstance(_member(answer, "response", f"{at}.{stage}"), str):
                raise UserError(f"results: {at}.{stage}.response is {answer['response']!r}; expected text")
            _number(answer, "gold", f"{at}.{stage}")


def _member(mapping: dict[str, Any], name: str, where: str) -> Any:
    if name not in mapping:
        raise UserError(f"results: {where} lacks {name!r}; it has {', '.join(map(str, mapping)) or 'nothing'}")
    return mapping[name]


def _is_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"results: {where} is {value!r}; expected an object")


def _number(mapping: dict[str, Any], name: str, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    value = _member(mapping, name, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        bounds = "" if low == -math.inf else f" ≥ {low:g}" if high == math.inf else f" in [{low:g}, {high:g}]"
        raise UserError(f"results: {where}.{name} is {value!r}; expected a finite number{bounds}")
    return float(value)


def _interval(mapping: dict[str, Any], name: str, where: str) -> None:
    value = _member(mapping, name, where)
    ends = isinstance(value, list | tuple) and len(value) == 2
    if not ends or not all(isinstance(end, int | float) and math.isfinite(end) for end in value) or value[0] > value[1]:
        raise UserError(f"results: {where}.{name} is {value!r}; expected [low, high]")


def _check_json(value: Any, where: str) -> None:
    """Whatever else is in the document must survive JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"results: {where} is not plain JSON ({error}); convert arrays and drop NaN before writing") from None
