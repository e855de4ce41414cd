"""KTO, BCO and APO-zero on single responses."""

from __future__ import annotations

import math

from tests.reference import maths, objectives


def log_ratio(table, ref, seqs, b):
    """log π(y|x) − log π_ref(y|x) of a row."""
    tokens, segments = seqs.tokens[b], seqs.segment_ids[b]
    policy, reference = objectives.logps(table, tokens, segments), objectives.logps(ref, tokens, segments)
    return sum(policy[t] - reference[t] for t in objectives.loss_tokens(seqs, b))


def real_rows(batch):
    return [b for b in range(batch.seqs.tokens.shape[0]) if objectives.real(batch.seqs, b)]


def sigmoid(x):
    return math.exp(maths.log_sigmoid(x))


def kto(new, case):
    """Ethayarajh et al. 2024: the mean of λ_y − v(x, y), where the reference point was estimated before the update."""
    batch, h, rows = case.batch, case.h, real_rows(case.batch)
    mismatched = [log_ratio(case.old["policy"], case.ref, batch.kl_seqs, b) for b in rows if objectives.real(batch.kl_seqs, b)]
    z = max(0.0, sum(mismatched) / len(mismatched)) if mismatched else 0.0
    losses = []
    for b in rows:
        r = log_ratio(new["policy"], case.ref, batch.seqs, b)
        if batch.desirable[b]:
            weight, value = h["desirable_weight"], h["desirable_weight"] * sigmoid(h["beta"] * (r - z))
        else:
            weight, value = h["undesirable_weight"], h["undesirable_weight"] * sigmoid(h["beta"] * (z - r))
        losses.append(weight - value)
    return sum(losses) / max(len(losses), 1)


def apo_zero_unpaired(new, case):
    """D'Oosterlinck et al. 2024: −σ(r) of the desirable, here + 1, and σ(r) of the undesirable."""
    batch, losses = case.batch, []
    for b in real_rows(batch):
        p = sigmoid(case.h["beta"] * log_ratio(new["policy"], case.ref, batch.seqs, b))
        losses.append(1.0 - p if batch.desirable[b] else p)
    return sum(losses) / max(len(losses), 1)


def bco(new, case):
    """Jung et al. 2024: the sum of both classes' mean cross-entropies; the shift is the mean reward of all responses met so far, at prepare."""
    batch, rows, beta = case.batch, real_rows(case.batch), case.h["beta"]
    before = case.carry["rewards"]
    met = [beta * log_ratio(case.old["policy"], case.ref, batch.seqs, b) for b in rows]
    count = float(before.count) + len(met)
    shift = (float(before.mean) * float(before.count) + sum(met)) / count
    parts = {True: [], False: []}
    for b in rows:
        above = beta * log_ratio(new["policy"], case.ref, batch.seqs, b) - shift
        good = bool(batch.desirable[b])
        parts[good].append(-maths.log_sigmoid(above if good else -above))
    return sum(sum(part) / max(len(part), 1) for part in parts.values())
