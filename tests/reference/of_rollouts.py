"""Policy gradients on rollouts without a critic, from their papers, one token at a time."""

from __future__ import annotations

import math

import numpy as np

from tests.reference import maths
from tests.reference.objectives import logps, loss_tokens, real


class Rows:
    """A rollout as `prepare` leaves it: per real row its own tokens, old and reference log-probs, advantages per token."""

    def __init__(self, case):
        self.case, self.h, batch = case, case.h, case.batch
        self.all = [b for b in range(batch.seqs.tokens.shape[0]) if real(batch.seqs, b)]
        self.own = {b: loss_tokens(batch.seqs, b) for b in self.all}
        self.old, self.ref, self.at = (self.read(table) for table in (case.old["policy"], case.ref, case.at["policy"]))
        self.raw = {b: float(batch.scores[b]) for b in self.all}
        self.group = {b: [c for c in self.all if batch.group_ids[c] == batch.group_ids[b]] for b in self.all}

    def read(self, table):
        """Log-probs of each row."""
        seqs = self.case.batch.seqs
        return {b: logps(table, seqs.tokens[b], seqs.segment_ids[b]) for b in self.all}

    def entropy(self, table, b, t):
        log_p = maths.log_softmax(table[self.case.batch.seqs.tokens[b, t - 1]])
        return -sum(math.exp(v) * v for v in log_p)

    def kl_of_row(self, b):
        return sum(maths.KL[self.h["kl_estimator"]](self.old[b][t] - self.ref[b][t]) for t in self.own[b])

    def returns(self):
        """Score − penalties of each row."""
        h, found = self.h, {}
        for b in self.all:
            r = self.raw[b] - (h["missing_eos_penalty"] if self.case.batch.truncated[b] else 0.0)
            if h["kl_in"] == "reward":
                r -= h["beta"] * self.kl_of_row(b)
            found[b] = r
        return found

    def weights(self, b):
        """The correction old/sampler of each token of a row."""
        h, sampler = self.h, self.case.batch.sampler_logps[b]
        kind, _, bound = h["correction"].partition("_")
        gaps = {t: self.old[b][t] - float(sampler[t]) for t in self.own[b]}
        if kind == "none":
            return dict.fromkeys(gaps, 1.0)
        if kind == "sequence":
            gaps = dict.fromkeys(gaps, sum(gaps.values()))
        low, high = h["correction_low"], h["correction_high"]
        bounded = {"truncate": lambda w: min(max(w, low), high), "mask": lambda w: w if low <= w <= high else 0.0}[bound]
        return {t: bounded(math.exp(x)) for t, x in gaps.items()}

    def dropped(self, b):
        """Rows that are not trained on."""
        h = self.h
        return (h.get("mask_truncated", False) and bool(self.case.batch.truncated[b])) or (
            h.get("filter_groups", False) and len({self.raw[c] for c in self.group[b]}) == 1)

    def train_on(self, advantages, weighted=True):
        """Fixes the tokens that are trained on and their advantages; `advantages` maps (row, token) to a number."""
        self.own = {b: [] if self.dropped(b) else own for b, own in self.own.items()}
        q, counted = self.h.get("entropy_quantile", 0.0), [(b, t) for b in self.all for t in self.own[b]]
        entropies = {(b, t): self.entropy(self.case.old["policy"], b, t) for b, t in counted}
        threshold = np.quantile(list(entropies.values()), q) - 1e-9 if q and counted else -math.inf
        self.advantage = {}
        for b in self.all:
            weights = self.weights(b)
            for t in self.own[b]:
                kept = entropies[b, t] >= threshold
                self.advantage[b, t] = advantages(b, t) * (weights[t] if weighted else 1.0) if kept else 0.0
            if self.own[b] and self.left_behind(b):
                self.advantage.update({(b, t): max(self.advantage[b, t], 0.0) for t in self.own[b]})
        self.trained = [b for b in self.all if self.own[b]]
        return self

    def left_behind(self, b):
        """DeepSeek-V3.2, eq. 9: whether the policy has moved too far from the row's sampler."""
        sampler, own = self.case.batch.sampler_logps[b], self.own[b]
        return sum(float(sampler[t]) - self.at[b][t] for t in own) / len(own) > self.h["off_policy_kl"]


def groups(case, weighted=True):
    """`prepare` of GRPO and its relatives."""
    rows = Rows(case)
    h, r = case.h, rows.returns()
    for b in rows.all:
        if h["overlong_length"]:  # DAPO, eq. 13, case by case
            length, longest, buffer = len(rows.own[b]), h["overlong_length"], h["overlong_buffer"]
            if length > longest:
                r[b] -= 1.0
            elif length > longest - buffer:
                r[b] += ((longest - buffer) - length) / buffer
    std = lambda values: float(np.std(values, ddof=1)) if len(values) > 1 else 0.0  # noqa: E731
    advantage = {}
    for b in rows.all:
        scores = [r[c] for c in rows.group[b]]
        scale = {"group": std(scores), "batch": std(list(r.values())), "none": None}[h["advantage_scale"]]
        centred = 0.0 if len(set(scores)) == 1 else r[b] - sum(scores) / len(scores)
        advantage[b] = centred if scale is None else centred / (scale + h["advantage_eps"])
    return rows.train_on(lambda b, t: advantage[b], weighted)


LAST: list = [None, None]  # the last case and its rows: finite differences ask for them again and again


def prepared(case, make):
    if LAST[0] is not case:
        LAST[:] = [case, make(case)]
    return LAST[1]


def ratio(rows, new, b, t):
    """log ρ of a token, of its row where the ratio is the sequence's; `new` are log-probs from `rows.read`."""
    own = rows.own[b] if rows.h.get("ratio_level", "token") == "sequence" else [t]
    return sum(new[b][s] - rows.old[b][s] for s in own) / len(own)


def clipped(rows, new, b, t):
    h = rows.h
    return maths.dual_clipped(ratio(rows, new, b, t), rows.advantage[b, t], h["clip_low"], h["clip_high"], h["dual_clip"])


def per_row(rows, term, divide):
    """Mean over rows of Σ_t term / divide(tokens)."""
    total = sum(sum(term(b, t) for t in rows.own[b]) / divide(len(rows.own[b])) for b in rows.trained)
    return total / max(len(rows.trained), 1)


def per_token(rows, term):
    own = [(b, t) for b in rows.trained for t in rows.own[b]]
    return sum(term(b, t) for b, t in own) / max(len(own), 1)


def own_mean(n):
    return n


def one(n):
    return 1.0


def total(rows, table, policy, average):
    """Policy term + KL + entropy bonus."""
    h, value, new = rows.h, policy, rows.read(table)

    def kl(b, t):
        weight = math.exp(new[b][t] - rows.old[b][t]) if h["unbiased_kl"] else 1.0
        return h["beta"] * weight * maths.KL[h["kl_estimator"]](new[b][t] - rows.ref[b][t])

    if h["kl_in"] == "loss" and h["beta"]:
        value += average(rows, kl)
    if h["entropy_coef"]:
        value -= h["entropy_coef"] * per_token(rows, lambda b, t: rows.entropy(table, b, t))
    return value


def row_means(rows, term):
    return per_row(rows, term, own_mean)


def row_sums(rows, term):
    return per_row(rows, term, one)


def clipped_objective(new, case, average):
    rows = prepared(case, groups)
    now = rows.read(new["policy"])
    return total(rows, new["policy"], average(rows, lambda b, t: clipped(rows, now, b, t)), average)


def grpo(new, case):
    return clipped_objective(new, case, row_means)


def gspo(new, case):
    return clipped_objective(new, case, row_means)


def dapo(new, case):
    return clipped_objective(new, case, per_token)


def bnpo(new, case):
    return clipped_objective(new, case, per_token)


def dr_grpo(new, case):
    return clipped_objective(new, case, lambda rows, term: per_row(rows, term, lambda n: case.h["length_scale"]))


def luspo(new, case):
    return clipped_objective(new, case, row_sums)


def cispo(new, case):
    rows, h = prepared(case, groups), case.h
    now = rows.read(new["policy"])

    def term(b, t):
        weight = min(max(math.exp(ratio(rows, rows.at, b, t)), 1.0 - h["clip_low"]), 1.0 + h["clip_high"])
        return -weight * rows.advantage[b, t] * now[b][t]

    return total(rows, new["policy"], per_token(rows, term), per_token)


def sapo(new, case):
    rows, h = prepared(case, groups), case.h
    now = rows.read(new["policy"])

    def term(b, t):
        a = rows.advantage[b, t]
        tau = h["temperature_pos"] if a > 0 else h["temperature_neg"]
        x = tau * (math.exp(ratio(rows, now, b, t)) - 1.0)
        return -4.0 / tau * math.exp(maths.log_sigmoid(x)) * a

    return total(rows, new["policy"], row_means(rows, term), row_means)


def gmpo(new, case):
    rows, h = prepared(case, groups), case.h
    now = rows.read(new["policy"])

    def of_row(b):
        counted = [t for t in rows.own[b] if rows.advantage[b, t] != 0]
        if not counted:
            return 0.0
        product = 1.0
        for t in counted:
            x, a = ratio(rows, now, b, t), rows.advantage[b, t]
            product *= math.exp((min(x, h["clip_high"]) if a > 0 else max(x, -h["clip_low"])) / len(counted))
        return -product * sum(rows.advantage[b, t] for t in counted) / len(counted)

    return total(rows, new["policy"], sum(map(of_row, rows.trained)) / max(len(rows.trained), 1), row_means)


def vespo(new, case):
    rows, h = prepared(case, lambda case: groups(case, weighted=False)), case.h
    now = rows.read(new["policy"])

    def phi(b, a):
        weights = rows.weights(b)
        of_sequence = h["correction"].startswith("sequence")
        log_w = sum(rows.at[b][t] - rows.old[b][t] for t in rows.own[b])
        log_w += sum(math.log(max(weights[t], 1e-8)) for t in (rows.own[b][:1] if of_sequence else rows.own[b]))
        w = math.exp(min(max(log_w, math.log(1e-8)), 20.0))
        k, decay = (h["k_pos"], h["lambda_pos"]) if a >= 0 else (h["k_neg"], h["lambda_neg"])
        return w**k * math.exp(decay * (1.0 - w))

    def term(b, t):
        a = rows.advantage[b, t]
        return -phi(b, a) * a * now[b][t]

    return total(rows, new["policy"], per_token(rows, term), per_token)


def reinforce(new, case):
    def make(case):
        rows = Rows(case)
        r = rows.returns()
        baseline = sum(r.values()) / len(r) if case.h["batch_baseline"] else 0.0
        return rows.train_on(lambda b, t: r[b] - baseline)

    rows = prepared(case, make)
    now = rows.read(new["policy"])
    return total(rows, new["policy"], row_sums(rows, lambda b, t: -rows.advantage[b, t] * now[b][t]), row_sums)


def rloo(new, case):
    def make(case):
        rows, h = Rows(case), case.h
        rows.raw = {b: min(max(r, -h["reward_clip"]), h["reward_clip"]) for b, r in rows.raw.items()}
        r, found = rows.returns(), {}
        for b in rows.all:
            others = [r[c] for c in rows.group[b] if c != b]
            found[b] = r[b] - sum(others) / len(others) if others else 0.0
        if h["normalise_advantages"]:
            values = list(found.values())
            centre, spread = sum(values) / len(values), float(np.std(values, ddof=1))
            found = {b: (a - centre) / (spread + h["advantage_eps"]) for b, a in found.items()}
        return rows.train_on(lambda b, t: found[b])

    rows, h = prepared(case, make), case.h
    now = rows.read(new["policy"])

    def of_row(b):
        x = sum(now[b][t] - rows.old[b][t] for t in rows.own[b])
        a = sum(rows.advantage[b, t] for t in rows.own[b]) / len(rows.own[b])
        return maths.dual_clipped(x, a, h["clip_low"], h["clip_high"], h["dual_clip"])

    return total(rows, new["policy"], sum(map(of_row, rows.trained)) / max(len(rows.trained), 1), row_sums)


def reinforce_pp(new, case):
    def make(case):
        rows, h = Rows(case), case.h
        found = {}
        for b in rows.all:
            score = rows.raw[b] - (h["missing_eos_penalty"] if case.batch.truncated[b] else 0.0)
            if h["group_baseline"]:
                scores = [rows.raw[c] - (h["missing_eos_penalty"] if case.batch.truncated[c] else 0.0) for c in rows.group[b]]
                score -= sum(scores) / len(scores)
            for i, t in enumerate(rows.own[b]):
                found[b, t] = h["gamma"] ** (len(rows.own[b]) - 1 - i) * score
                if h["kl_in"] == "reward":
                    found[b, t] -= sum(h["beta"] * h["gamma"] ** (j - i) * maths.KL[h["kl_estimator"]](rows.old[b][s] - rows.ref[b][s])
                                       for j, s in enumerate(rows.own[b]) if j >= i)
        kept = np.array([v for (b, t), v in found.items() if not rows.dropped(b)])
        centre, spread = kept.mean(), math.sqrt(kept.var(ddof=1) + 1e-8)
        return rows.train_on(lambda b, t: (found[b, t] - centre) / spread)

    rows = prepared(case, make)
    now = rows.read(new["policy"])
    return total(rows, new["policy"], per_token(rows, lambda b, t: clipped(rows, now, b, t)), per_token)
