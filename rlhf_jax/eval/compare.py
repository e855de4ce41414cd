"""The evaluation of one policy against another on held-out prompts: gold, win rate with its interval, distance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.eval.generation import by_prompt, evaluate_generation, shares, summarise
from rlhf_jax.eval.models import Policy
from rlhf_jax.eval.statistics import mean_ci, paired_bootstrap, win_values
from rlhf_jax.sampling import best_of, kl_bound
from rlhf_jax.types import Array, Sequences

RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a policy did on a set of prompts."""

    greedy: list[dict[str, Any]]  # records of eval.generation, one per prompt
    sampled: list[dict[str, Any]]  # one per sample, with seq_kl where there is a reference; those of a prompt are neighbours

    def golds(self) -> np.ndarray:
        """[N, S] gold of the samples, prompts in ascending order."""
        grouped: dict[int, list[float]] = {}
        for record in self.sampled:
            grouped.setdefault(record["prompt_id"], []).append(record["gold"])
        return np.array([grouped[prompt_id] for prompt_id in sorted(grouped)])


def evaluate(policy: Policy, reference: Policy | None, one: Any, several: Any, gold: Callable[[str, str], float], *, max_new_tokens: int,
             temperature: float, seed: int, samples: int = 1, rows: int = 0, cache: str = "same") -> Evaluation:
    """Greedy and sampled completions of every prompt, with their gold; samples carry the sequence KL from `reference`.

    Args:
      policy: the evaluated one.
      reference: from which seq_kl is measured; None: it is not.
      one: prompt set with one row per prompt, for greedy.
      several: the same prompts, several rows each, for samples; the rows of a prompt are neighbours.
      gold: (prompt, response) -> worth.
      max_new_tokens: tokens.
      temperature: of the samples.
      seed: of the samples.
      samples: rows of a prompt in `several`, whose prompt is prefilled once.
      rows: decoded at once at most, those that have ended replaced by others of the batch; 0 = all of the batch.
      cache: precision of keys and values while decoding, one of models.cache.KINDS.
    """
    tokenizer, (group, slots) = policy.source.reader("--checkpoint"), shares(samples, rows)
    how: dict[str, Any] = dict(seed=seed, max_new_tokens=max_new_tokens, cache=cache)

    def logps(one: Policy) -> Callable[[Sequences], Array]:
        return lambda seqs: one.logps(seqs, temperature=temperature, rows=rows)

    greedy = evaluate_generation(lambda prompts: policy.generate(prompts, temperature=0.0, slots=rows, **how), one, tokenizer, gold)
    sampled = evaluate_generation(
        lambda prompts: policy.generate(prompts, temperature=temperature, group_size=group, slots=slots, **how), several, tokenizer, gold,
        policy_logps=None if reference is None else logps(policy), ref_logps=None if reference is None else logps(reference),
    )
    return Evaluation(greedy, sampled)


def row(ours: Evaluation, baseline: Evaluation | None, *, seed: int = 0) -> dict[str, Any]:
    """The report's numbers: gold_greedy, gold_sample (with intervals), win_vs_sft, win_ci95, seq_kl (null where it was not measured), length,
    truncated.

    Args:
      ours: of the policy.
      baseline: of the SFT policy on the same prompts; None for SFT itself, whose win rate is null.
      seed: of the bootstrap.
    """
    sampled = summarise(ours.sampled)
    values: dict[str, Any] = {"win_vs_sft": None, "win_ci95": None, "seq_kl": sampled.get("seq_kl"), "length": sampled["length"],
                              "truncated": sampled["truncated"]}
    for name, records in (("gold_greedy", ours.greedy), ("gold_sample", ours.sampled)):
        values |= _mean(name, np.array(list(by_prompt(records, "gold").values())))
    if baseline is not None:
        values["win_vs_sft"], values["win_ci95"] = _wins(ours.golds(), baseline, seed)
    return values


def best_row(ours: Evaluation, scores: np.ndarray, baseline: Evaluation | None, *, seed: int = 0) -> dict[str, Any]:
    """What the best sample of each prompt, as a reward chooses it, is worth: gold_best with its interval, against the baseline's samples
    win_best and win_best_ci95, and kl_bound, the most by which choosing moves the policy, nats per response.

    Args:
      ours: of the policy, with as many samples of every prompt.
      scores: [N · S], what the reward says of `ours.sampled`.
      baseline: as in `row`.
      seed: of the bootstrap.
    """
    golds = ours.golds()
    chosen = np.asarray(best_of(jnp.asarray(scores), n=golds.shape[1]).row)
    values = {"best_of": golds.shape[1], "kl_bound": kl_bound(golds.shape[1]), **_mean("gold_best", golds.reshape(-1)[chosen])}
    if baseline is not None:
        values["win_best"], values["win_best_ci95"] = _wins(golds.reshape(-1)[chosen], baseline, seed)
    return values


def _mean(name: str, values: np.ndarray) -> dict[str, Any]:
    mean, low, high = mean_ci(values)
    return {name: mean, f"{name}_ci95": [low, high]}


def _wins(golds: np.ndarray, baseline: Evaluation, seed: int) -> tuple[float, list[float]]:
    wins = win_values(golds, baseline.golds())
    return float(wins.mean()), list(paired_bootstrap(wins, resamples=RESAMPLES, seed=seed))
