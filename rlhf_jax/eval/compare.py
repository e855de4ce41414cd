"""The evaluation of one policy against another on held-out prompts: gold, win rate with its interval, distance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_jax.eval.generation import by_prompt, evaluate_generation, summarise
from rlhf_jax.eval.models import Policy
from rlhf_jax.eval.statistics import mean_ci, paired_bootstrap, win_values

RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a policy did on a set of prompts."""

    greedy: list[dict[str, Any]]  # records of eval.generation, one per prompt
    sampled: list[dict[str, Any]]  # one per sample, with seq_kl

    def golds(self) -> np.ndarray:
        """[N, S] gold of the samples, prompts in ascending order."""
        grouped: dict[int, list[float]] = {}
        for record in self.sampled:
            grouped.setdefault(record["prompt_id"], []).append(record["gold"])
        return np.array([grouped[prompt_id] for prompt_id in sorted(grouped)])


def evaluate(policy: Policy, reference: Policy, one: Any, several: Any, gold: Callable[[str, str], float], *, max_new_tokens: int,
             temperature: float, seed: int, rows: int = 0) -> Evaluation:
    """Greedy and sampled completions of every prompt, with their gold; samples carry the sequence KL from `reference`.

    Args:
      policy: the evaluated one.
      reference: from which seq_kl is measured.
      one: prompt set with one row per prompt, for greedy.
      several: the same prompts, several rows each, for samples.
      gold: (prompt, response) -> worth.
      max_new_tokens: tokens.
      temperature: of the samples.
      seed: of the samples.
      rows: decoded at once, those that have ended replaced by others of the batch, whole groups of samples; 0 = all of the batch.
    """
    tokenizer = policy.source.reader("--checkpoint")
    how: dict[str, Any] = dict(seed=seed, max_new_tokens=max_new_tokens, slots=rows)
    greedy = evaluate_generation(lambda prompts: policy.generate(prompts, temperature=0.0, **how), one, tokenizer, gold)
    sampled = evaluate_generation(
        lambda prompts: policy.generate(prompts, temperature=temperature, **how), several, tokenizer, gold,
        policy_logps=lambda seqs: policy.logps(seqs, temperature=temperature, rows=rows),
        ref_logps=lambda seqs: reference.logps(seqs, temperature=temperature, rows=rows),
    )
    return Evaluation(greedy, sampled)


def row(ours: Evaluation, baseline: Evaluation | None, *, seed: int = 0) -> dict[str, Any]:
    """The report's numbers: gold_greedy, gold_sample (with intervals), win_vs_sft, win_ci95, seq_kl, length, truncated.

    Args:
      ours: of the policy.
      baseline: of the SFT policy on the same prompts; None for SFT itself, whose win rate is null.
      seed: of the bootstrap.
    """
    sampled = summarise(ours.sampled)
    values: dict[str, Any] = {"win_vs_sft": None, "win_ci95": None, "seq_kl": sampled["seq_kl"], "length": sampled["length"],
                              "truncated": sampled["truncated"]}
    for name, records in (("gold_greedy", ours.greedy), ("gold_sample", ours.sampled)):
        mean, low, high = mean_ci(list(by_prompt(records, "gold").values()))
        values |= {name: mean, f"{name}_ci95": [low, high]}
    if baseline is not None:
        wins = win_values(ours.golds(), baseline.golds())
        values |= {"win_vs_sft": float(wins.mean()), "win_ci95": list(paired_bootstrap(wins, resamples=RESAMPLES, seed=seed))}
    return values
