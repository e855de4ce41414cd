"""Objectives on preference pairs, one pair and token at a time."""

from __future__ import annotations

import math

import jax
import numpy as np

from tests.reference import maths, objectives
from tests.reference.maths import log_sigmoid


def sigmoid(x):
    return math.exp(log_sigmoid(x))


def real_pairs(case):
    return [b for b in range(len(case.batch.seqs.tokens)) if all(objectives.real(case.batch.seqs, (b, k)) for k in (0, 1))]


def of_tokens(table, case, b, read=objectives.logps):
    """(those of y_w, those of y_l): a number per token of each response."""
    seqs = case.batch.seqs
    return tuple([read(table, seqs.tokens[b, k], seqs.segment_ids[b, k])[t] for t in objectives.loss_tokens(seqs, (b, k))] for k in (0, 1))


def log_ratios(table, case, b, reference=None):
    """log π(y|x) − log π_ref(y|x) of (y_w, y_l), summed over their tokens."""
    ref = of_tokens(case.ref if reference is None else reference, case, b)
    return tuple(sum(p) - sum(q) for p, q in zip(of_tokens(table, case, b), ref))


def mean(values):
    """0 without any."""
    values = list(values)
    return sum(values) / max(len(values), 1)


def over_pairs(new, case, loss):
    """The mean over pairs of loss(log-ratio of y_w, log-ratio of y_l)."""
    return mean(loss(*log_ratios(new["policy"], case, b)) for b in real_pairs(case))


def cdpo(new, case):
    beta, epsilon = case.h["beta"], case.h["epsilon"]
    return over_pairs(new, case, lambda w, l: -(1 - epsilon) * log_sigmoid(beta * (w - l)) - epsilon * log_sigmoid(beta * (l - w)))


def robust_dpo(new, case):
    beta, epsilon = case.h["beta"], case.h["epsilon"]

    def loss(w, l):
        return (-(1 - epsilon) * log_sigmoid(beta * (w - l)) + epsilon * log_sigmoid(beta * (l - w))) / (1 - 2 * epsilon)

    return over_pairs(new, case, loss)


def ipo(new, case):
    def loss(b):
        parts = []
        for policy, reference in zip(of_tokens(new["policy"], case, b), of_tokens(case.ref, case, b)):
            length = max(len(policy), 1) if case.h["reduction"] == "mean" else 1
            parts.append((sum(policy) - sum(reference)) / length)
        return (parts[0] - parts[1] - 1 / (2 * case.h["tau"])) ** 2

    return mean(map(loss, real_pairs(case)))


def hinge(new, case):
    return over_pairs(new, case, lambda w, l: max(0.0, 1 - case.h["beta"] * (w - l)))


def exo(new, case):
    def loss(w, l):
        h = case.h["beta"] * (w - l)
        policy, label = (log_sigmoid(h), log_sigmoid(-h)), (math.log(1 - case.h["epsilon"]), math.log(case.h["epsilon"]))
        return sum(math.exp(p) * (p - q) for p, q in zip(policy, label))

    return over_pairs(new, case, loss)


def nca(new, case):
    beta = case.h["beta"]
    return over_pairs(new, case, lambda w, l: -log_sigmoid(beta * w) - (log_sigmoid(-beta * w) + log_sigmoid(-beta * l)) / 2)


def sppo(new, case):
    return over_pairs(new, case, lambda w, l: (w - case.h["eta"] * (1 - 0.5)) ** 2 + (l - case.h["eta"] * (0 - 0.5)) ** 2)


def apo_zero(new, case):
    beta = case.h["beta"]
    return over_pairs(new, case, lambda w, l: 1 - sigmoid(beta * w) + sigmoid(beta * l))


def apo_down(new, case):
    beta = case.h["beta"]
    return over_pairs(new, case, lambda w, l: 1 + sigmoid(beta * w) - sigmoid(beta * (w - l)))


def discopop(new, case):
    def loss(w, l):
        h = case.h["beta"] * (w - l)
        mixture = sigmoid(h / case.h["tau"])
        return -(1 - mixture) * log_sigmoid(h) + mixture * math.exp(-h)

    return over_pairs(new, case, loss)


def dpo_norm(new, case):
    def loss(b):
        w, l = (mean(p) - mean(q) for p, q in zip(of_tokens(new["policy"], case, b), of_tokens(case.ref, case, b)))
        return -log_sigmoid(case.h["beta"] * (w - l))

    return mean(map(loss, real_pairs(case)))


def score(divergence, alpha, u):
    """f'(t) − f'(1) at t = e^u, exponentials held at e^30."""
    if divergence == "reverse_kl":
        return u
    if divergence == "forward_kl":
        return 1 - math.exp(min(-u, 30))
    if divergence == "jensen_shannon":
        return math.log(2) + log_sigmoid(u)
    return (1 - math.exp(min(-alpha * u, 30))) / alpha


def f_dpo(new, case):
    h = case.h

    def loss(w, l):
        return -log_sigmoid(h["beta"] * (score(h["divergence"], h["alpha"], w) - score(h["divergence"], h["alpha"], l)))

    return over_pairs(new, case, loss)


def ld_dpo(new, case):
    def loss(b):
        policy, reference = of_tokens(new["policy"], case, b), of_tokens(case.ref, case, b)
        shared, parts = min(map(len, policy)), []
        for p, q in zip(policy, reference):
            parts.append(sum((x - y) * (1 if i < shared else case.h["alpha"]) for i, (x, y) in enumerate(zip(p, q))))
        return -log_sigmoid(case.h["beta"] * (parts[0] - parts[1]))

    return mean(map(loss, real_pairs(case)))


def r_dpo(new, case):
    def loss(b):
        w, l = log_ratios(new["policy"], case, b)
        longer = len(of_tokens(new["policy"], case, b)[0]) - len(of_tokens(new["policy"], case, b)[1])
        return -log_sigmoid(case.h["beta"] * (w - l) + case.h["alpha"] * longer)

    return mean(map(loss, real_pairs(case)))


def log_sum_of_squares(table, tokens, segments):
    out = np.zeros(len(tokens))
    for t in range(len(tokens)):
        if objectives.predecessor(segments, t):
            out[t] = math.log(sum(math.exp(v) ** 2 for v in maths.log_softmax(table[tokens[t - 1]])))
    return out


def wpo(new, case):
    def loss(b):
        weight = 1.0
        for p, squares in zip(of_tokens(case.at["policy"], case, b), of_tokens(case.at["policy"], case, b, log_sum_of_squares)):
            weight *= math.exp(mean(x - y for x, y in zip(p, squares)))
        w, l = log_ratios(new["policy"], case, b)
        return -min(weight, case.h["weight_max"]) * log_sigmoid(case.h["beta"] * (w - l))

    return mean(map(loss, real_pairs(case)))


def dpo_and_nll(new, case, dpo_weight, nll_weight):
    def loss(b):
        w, l = log_ratios(new["policy"], case, b)
        return -dpo_weight * log_sigmoid(case.h["beta"] * (w - l)) - nll_weight * mean(of_tokens(new["policy"], case, b)[0])

    return mean(map(loss, real_pairs(case)))


def rpo(new, case):
    return dpo_and_nll(new, case, 1.0, case.h["alpha"])


def aot(new, case):
    rows = real_pairs(case)

    def margins(table):
        return {b: sum(of_tokens(table, case, b)[0]) - sum(of_tokens(table, case, b)[1]) for b in rows}

    now, then, reference = margins(new["policy"]), margins(case.old["policy"]), sorted(margins(case.ref).values())
    order = sorted(rows, key=then.get)
    return mean(-log_sigmoid(case.h["beta"] * (now[b] - v)) for b, v in zip(order, reference))


def aot_unpaired(new, case):
    rows = real_pairs(case)
    now, then = ({b: log_ratios(table["policy"], case, b) for b in rows} for table in (new, case.old))
    chosen, rejected = (sorted(rows, key=lambda b, k=k: then[b][k]) for k in (0, 1))
    return mean(-log_sigmoid(case.h["beta"] * (now[i][0] - now[j][1])) for i, j in zip(chosen, rejected))


def shift(case):
    """The mean of the rewards of this first batch, of the policy that prepared it."""
    return mean(case.h["beta"] * u for b in real_pairs(case) for u in log_ratios(case.old["policy"], case, b))


def bco_pair(new, case):
    beta, delta = case.h["beta"], shift(case)
    return over_pairs(new, case, lambda w, l: -log_sigmoid(beta * w - delta) - log_sigmoid(-(beta * l - delta)))


def mpo(new, case):
    h = case.h
    return dpo_and_nll(new, case, h["preference_weight"], h["generation_weight"]) + h["quality_weight"] * bco_pair(new, case)


def gap(table, case, b):
    w, l = log_ratios(table, case, b)
    return w - l


def beta_dpo(new, case):
    h, rows = case.h, real_pairs(case)
    gaps = {b: h["beta"] * gap(case.old["policy"], case, b) for b in rows}
    centre = mean(gaps.values())
    deviation = math.sqrt(sum((g - centre) ** 2 for g in gaps.values()) / max(len(rows) - 1, 1))
    m = h["momentum"]
    usual = m * float(case.carry["mean"]) + (1 - m) * centre
    spread = m * float(case.carry["std"]) + (1 - m) * deviation
    # The draw itself is the package's: Gumbel noise of (batch's key, row), the largest sums win.
    noise = {b: float(jax.random.gumbel(jax.random.fold_in(jax.random.key(0), b))) for b in rows}
    best = sorted(rows, key=lambda b: noise[b] - (gaps[b] - usual) ** 2 / (2 * spread**2), reverse=True)
    kept = best[: max(int(h["keep"] * len(rows)), 1)]
    beta = max(h["beta"] * (1 + h["alpha"] * (mean(gaps[b] for b in kept) - usual)), 1e-3)
    return mean(-log_sigmoid(beta * gap(new["policy"], case, b)) for b in kept)


def tr_dpo(new, case):
    """The first batch: the reference is where the carry starts."""

    def loss(b):
        w, l = log_ratios(new["policy"], case, b, np.asarray(case.carry["policy"], np.float64))
        return -log_sigmoid(case.h["beta"] * (w - l))

    return mean(map(loss, real_pairs(case)))


def simpo(new, case):
    def loss(b):
        w, l = map(mean, of_tokens(new["policy"], case, b))
        return -log_sigmoid(case.h["beta"] * w - case.h["beta"] * l - case.h["gamma"])

    return mean(map(loss, real_pairs(case)))


def alphapo(new, case):
    alpha = case.h["alpha"]

    def loss(b):
        w, l = ((1 - math.exp(min(-alpha * mean(p), 30))) / alpha for p in of_tokens(new["policy"], case, b))
        return -log_sigmoid(case.h["beta"] * (w - l) - case.h["gamma"])

    return mean(map(loss, real_pairs(case)))


def cpo(new, case):
    h = case.h

    def loss(b):
        tokens = of_tokens(new["policy"], case, b)
        w, l = map(sum, tokens)
        likelihood = w if h["nll"] == "sum" else mean(tokens[0])
        pair = -(1 - h["epsilon"]) * log_sigmoid(h["beta"] * (w - l)) - h["epsilon"] * log_sigmoid(h["beta"] * (l - w))
        return pair - h["alpha"] * likelihood

    return mean(map(loss, real_pairs(case)))


def orpo(new, case):
    rows = real_pairs(case)
    tokens = {b: of_tokens(new["policy"], case, b) for b in rows}

    def log_odds(logps):
        p = math.exp(min(mean(logps), -1e-6))
        return math.log(p) - math.log(1 - p)

    def chosen(b):
        """log π of the tokens of y_w, or of x and y_w but for the first, which nothing predicts."""
        row, segments = case.batch.seqs.tokens[b, 0], case.batch.seqs.segment_ids[b, 0]
        every = [x for t, x in enumerate(objectives.logps(new["policy"], row, segments)) if objectives.predecessor(segments, t)]
        return {"response": tokens[b][0], "all": every}[case.h["nll_over"]]

    nll = mean(-x for b in rows for x in chosen(b))
    return nll + case.h["odds_coef"] * mean(-log_sigmoid(log_odds(tokens[b][0]) - log_odds(tokens[b][1])) for b in rows)
