"""Reward models on rankings, ratings and steps. The tabular reward after a token is the sum of the table over its row's tokens so far."""

from __future__ import annotations

import math

from tests.reference import maths, objectives


def scores(table, seqs, index):
    """The score after each token of a row, None on padding."""
    total, found = 0.0, []
    for token, segment in zip(seqs.tokens[index], seqs.segment_ids[index]):
        total += table[token] if segment else 0.0
        found.append(total if segment else None)
    return found


def last(found):
    return [score for score in found if score is not None][-1]


def plackett_luce(new, case):
    """Zhu et al. 2023: the probability of a ranking is a product of softmax choices among the responses that are left."""
    seqs, losses = case.batch.seqs, []
    rows, branches, _ = seqs.tokens.shape
    for b in range(rows):
        r = [last(scores(new["reward"], seqs, (b, k))) for k in range(branches) if objectives.real(seqs, (b, k))]
        if not (objectives.real(seqs, (b, 0)) and objectives.real(seqs, (b, 1))):
            continue
        loss = 0.0
        while r:
            top = max(r)
            loss -= r[0] - (top + math.log(sum(math.exp(x - top) for x in r)))
            r = r[1:]
        losses.append(loss)
    return sum(losses) / max(len(losses), 1)


def labels(new, case):
    """(score, target, weight) of every label on a real token."""
    seqs = case.batch.seqs
    for b in range(seqs.tokens.shape[0]):
        for t, score in enumerate(scores(new["reward"], seqs, b)):
            weight = float(case.batch.weights[b, t])
            if score is not None and weight:
                yield score, float(case.batch.targets[b, t]), weight


def average(pairs):
    total = sum(weight * value for value, weight in pairs)
    count = sum(weight for _, weight in pairs)
    return total / count if count else 0.0


def pointwise(new, case):
    return average([((score - target) ** 2, weight) for score, target, weight in labels(new, case)])


def process_reward(new, case):
    """Lightman et al. 2023: maximum likelihood of the verdicts."""
    return average([
        (-maths.log_sigmoid(score if target else -score), weight) for score, target, weight in labels(new, case)
    ])
