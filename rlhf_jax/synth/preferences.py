"""Preference pairs from a model's own samples, labelled by a noisy Bradley–Terry draw on gold.

Flow: a prompt's samples are paired at random, pairs of identical texts are skipped and counted, and each pair is labelled by a coin that
knows the gold,

    P(a ≻ b) = σ( scale · (gold_a − gold_b) ),

as a human annotator who mostly sees the better one. The RNG is counter-based on (seed, prompt id): a prompt's pairs do not depend on
which other prompts are labelled, nor in which order. The rows written hold no gold, so that training cannot read it; what the
labelling did (share of labels against the gold, ties, skipped) is returned beside them as an audit.

See: Bradley & Terry 1952; Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization" (arXiv:2210.10760), the synthetic setup.
Deviation: their gold labels are noiseless; these are drawn, as from people.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.files import whole

Gold = Callable[[str, str], float]


@dataclasses.dataclass(frozen=True)
class Samples:
    """One prompt with a model's responses to it."""

    prompt_id: int
    prompt: str  # the user's message
    responses: Sequence[str]  # n ≥ 2 texts


@dataclasses.dataclass
class LabelAudit:
    """What the labelling did; the only place where gold leaves a trace, and not a training file."""

    prompts: int = 0
    pairs: int = 0
    identical: int = 0  # pairs met and skipped because both texts are the same
    ties: int = 0  # pairs kept whose golds are equal: the label is a fair coin
    flips: int = 0  # pairs labelled against the gold
    expected_flips: float = 0.0  # Σ σ(−scale · |Δ gold|) over pairs without ties
    prompts_without_pair: int = 0

    def as_dict(self) -> dict[str, float]:
        """The counts, and `flip_share`: flips among the pairs whose golds differ."""
        return {**dataclasses.asdict(self), "flip_share": self.flips / max(self.pairs - self.ties, 1)}


def label_pairs(
    samples: Iterable[Samples], gold: Gold, *, scale: float, pairs_per_prompt: int, seed: int
) -> tuple[list[dict[str, Any]], LabelAudit]:
    """Preference rows with noisy labels.

    Args:
      samples: prompts with n ≥ 2 responses each.
      gold: (prompt, response) -> worth.
      scale: Bradley–Terry scale ≥ 0 per unit of gold; 0 is a fair coin, ∞ never errs.
      pairs_per_prompt: at most so many pairs of differing texts per prompt, drawn without replacement.
      seed: of the draws.

    Returns:
      (rows {prompt, chosen, rejected, prompt_id}, the audit).

    Raises:
      ValueError: scale < 0, pairs_per_prompt < 1, or a prompt with fewer than two responses.
    """
    if not scale >= 0 or pairs_per_prompt < 1:
        raise ValueError(f"label_pairs: scale={scale} must be ≥ 0 and pairs_per_prompt={pairs_per_prompt} ≥ 1")
    rows, audit = [], LabelAudit()
    for sample in samples:
        rng = _generator(seed, sample.prompt_id)
        pairs, identical = _draw_pairs(sample, rng, pairs_per_prompt)
        audit.prompts += 1
        audit.identical += identical
        audit.prompts_without_pair += not pairs
        for a, b in pairs:
            gap = gold(sample.prompt, a) - gold(sample.prompt, b)
            a_wins = rng.random() < _sigmoid(scale, gap)
            audit.pairs += 1
            audit.ties += gap == 0
            audit.flips += gap != 0 and a_wins != (gap > 0)
            audit.expected_flips += _sigmoid(scale, -abs(gap)) if gap != 0 else 0.0
            rows.append(_row(sample, *((a, b) if a_wins else (b, a))))
    return rows, audit


def clean_pairs(samples: Iterable[Samples], gold: Gold, *, pairs_per_prompt: int, seed: int) -> tuple[list[dict[str, Any]], LabelAudit]:
    """Pairs ordered by gold without noise, for a reward model's test accuracy; pairs of equal gold have no order, are skipped and counted.

    Args:
      samples: prompts with n ≥ 2 responses each.
      gold: (prompt, response) -> worth.
      pairs_per_prompt: at most so many pairs of differing texts per prompt are looked at.
      seed: of the draw of pairs.

    Returns:
      (rows, the audit); `audit.ties` counts the skipped pairs, `audit.pairs` the rows.

    Raises:
      ValueError: pairs_per_prompt < 1, or a prompt with fewer than two responses.
    """
    if pairs_per_prompt < 1:
        raise ValueError(f"clean_pairs: pairs_per_prompt={pairs_per_prompt} must be ≥ 1")
    rows, audit = [], LabelAudit()
    for sample in samples:
        pairs, identical = _draw_pairs(sample, _generator(seed, sample.prompt_id), pairs_per_prompt)
        kept = 0
        for a, b in pairs:
            gap = gold(sample.prompt, a) - gold(sample.prompt, b)
            if gap != 0:
                rows.append(_row(sample, *((a, b) if gap > 0 else (b, a))))
                kept += 1
        audit.prompts += 1
        audit.pairs += kept
        audit.identical += identical
        audit.ties += len(pairs) - kept
        audit.prompts_without_pair += not kept
    return rows, audit


def write_preferences(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as preference JSONL, whole or not at all: a temporary file beside `path` is renamed over it when complete.

    Args:
      path: the JSONL file; its folder is made.
      rows: each with prompt, chosen and rejected, no gold.

    Returns:
      the number of rows.

    Raises:
      ValueError: a row lacks a field or carries a gold.
    """
    count = 0
    with whole(path) as file:
        for count, row in enumerate(rows, start=1):
            if not {"prompt", "chosen", "rejected"} <= row.keys() or any("gold" in name for name in row):
                raise ValueError(f"write_preferences: row {count} has {sorted(row)}; it needs prompt, chosen, rejected and no gold")
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def _generator(seed: int, prompt_id: int) -> np.random.Generator:
    """Counter-based: the key is (seed, prompt id), so every prompt has a stream of its own."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, prompt_id], np.uint64)))


def _draw_pairs(sample: Samples, rng: np.random.Generator, limit: int) -> tuple[list[tuple[str, str]], int]:
    """Up to `limit` pairs of differing texts in random order and orientation, and the number of identical pairs met on the way."""
    if len(sample.responses) < 2:
        raise ValueError(f"preference pairs: prompt {sample.prompt_id} has {len(sample.responses)} samples; a pair needs 2")
    candidates = list(itertools.combinations(range(len(sample.responses)), 2))
    pairs, identical = [], 0
    for index in rng.permutation(len(candidates)):
        a, b = (sample.responses[i] for i in candidates[index])
        if a == b:
            identical += 1
            continue
        pairs.append((a, b) if rng.random() < 0.5 else (b, a))
        if len(pairs) == limit:
            break
    return pairs, identical


def _row(sample: Samples, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": sample.prompt, "chosen": chosen, "rejected": rejected, "prompt_id": sample.prompt_id}


def _sigmoid(scale: float, gap: float) -> float:
    """σ(scale · gap) without overflow; a gap of 0 is a fair coin at any scale, ∞ included."""
    if gap == 0:
        return 0.5
    x = scale * gap
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
