"""Objectives on judged pairs of samples, rows 2i and 2i + 1 of a rollout, written from Guo et al. 2024, Xie et al. 2024 and Munos et al. 2023."""

from __future__ import annotations

import math

from tests.reference import maths
from tests.reference.objectives import logps, loss_tokens, real


def response(table, batch, row):
    """log π(y|x), Σ over the row's own tokens."""
    every = logps(table, batch.seqs.tokens[row], batch.seqs.segment_ids[row])
    return sum(every[t] for t in loss_tokens(batch.seqs, row))


def pairs(batch):
    """(first row, second row) of every pair whose samples are both real."""
    return [(i, i + 1) for i in range(0, batch.seqs.tokens.shape[0], 2) if real(batch.seqs, i) and real(batch.seqs, i + 1)]


def score(case, row):
    return float(case.batch.scores[row]) - (case.h["missing_eos_penalty"] if case.batch.truncated[row] else 0.0)


def dpo_on_scores(new, case, first, second):
    """DPO's loss with the higher score preferred; 0 without a preference."""
    if score(case, first) == score(case, second):
        return 0.0
    better, worse = (first, second) if score(case, first) > score(case, second) else (second, first)
    margins = [response(new["policy"], case.batch, row) - response(case.ref, case.batch, row) for row in (better, worse)]
    return -maths.log_sigmoid(case.h["beta"] * (margins[0] - margins[1]))


def online_dpo(new, case):
    found = pairs(case.batch)
    return sum(dpo_on_scores(new, case, *pair) for pair in found) / max(len(found), 1)


def xpo(new, case):
    total, found = 0.0, pairs(case.batch)
    for mine, of_reference in found:
        total += dpo_on_scores(new, case, mine, of_reference) + case.h["alpha"] * response(new["policy"], case.batch, of_reference)
    return total / max(len(found), 1)


def nash_md(new, case):
    total, found = 0.0, pairs(case.batch)
    for mine, other in found:
        preferred = 1.0 / (1.0 + math.exp(score(case, other) - score(case, mine)))
        ratio = response(case.at["policy"], case.batch, mine) - response(case.ref, case.batch, mine)
        total -= (preferred - 0.5 - case.h["tau"] * ratio) * response(new["policy"], case.batch, mine)
    return total / max(len(found), 1)


def online_ipo(new, case):
    total, found = 0.0, pairs(case.batch)
    for first, second in found:
        if score(case, first) != score(case, second):
            better, worse = (first, second) if score(case, first) > score(case, second) else (second, first)
            margins = [response(new["policy"], case.batch, row) - response(case.ref, case.batch, row) for row in (better, worse)]
            total += (margins[0] - margins[1] - 1.0 / (2.0 * case.h["tau"])) ** 2
    return total / max(len(found), 1)
