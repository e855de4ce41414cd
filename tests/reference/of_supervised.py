"""Maximum likelihood with other weights, distillation from a teacher, and PPO with a second data set, one token at a time."""

from __future__ import annotations

import math

from tests.reference import maths, objectives, of_first


def dft(new, case):
    total, count = 0.0, 0
    for b in range(len(case.batch.tokens)):
        tokens, segments = case.batch.tokens[b], case.batch.segment_ids[b]
        log_p, fixed = objectives.logps(new["policy"], tokens, segments), objectives.logps(case.at["policy"], tokens, segments)
        for t in objectives.loss_tokens(case.batch, b):
            total -= math.exp(fixed[t]) * log_p[t]
            count += 1
    return total / max(count, 1)


def neftune(new, case):
    """Without keys there is no noise."""
    return objectives.sft(new["policy"], case.batch)


def kl(p, q):
    """Σ_v p_v (log p_v − log q_v), of log-probs."""
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q))


def jsd(teacher, student, beta):
    """β KL(T ‖ M) + (1 − β) KL(S ‖ M), of log-probs."""
    mixture = []
    for t, s in zip(teacher, student):
        top = max(t, s)  # e^-60 and less is lost beside it
        mixture.append(top + math.log(beta * math.exp(t - top) + (1 - beta) * math.exp(s - top)))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def distilled(new, case, seqs, divergence):
    """The divergence averaged over each response, every segment one of its own, then over the responses that have a token."""
    means = []
    for b in range(len(seqs.tokens)):
        for segment in sorted(set(seqs.segment_ids[b].tolist()) - {0}):
            own = []
            for t in objectives.loss_tokens(seqs, b):
                if seqs.segment_ids[b, t] == segment:
                    before = seqs.tokens[b, t - 1]
                    student, teacher = (maths.log_softmax(table[before] / case.h["temperature"]) for table in (new["policy"], case.ref))
                    own.append(divergence(teacher, student))
            if own:
                means.append(sum(own) / len(own))
    return sum(means) / max(len(means), 1)


def forward_kl(new, case):
    return distilled(new, case, case.batch, kl)


def reverse_kl(new, case):
    return distilled(new, case, case.batch, lambda teacher, student: kl(student, teacher))


def gkd(new, case):
    return distilled(new, case, case.batch, lambda teacher, student: jsd(teacher, student, case.h["beta"]))


def on_policy_gkd(new, case):
    return distilled(new, case, case.batch.seqs, lambda teacher, student: jsd(teacher, student, case.h["beta"]))


def on_policy_reverse_kl(new, case):
    return distilled(new, case, case.batch.seqs, lambda teacher, student: kl(student, teacher))


def ppo_ptx(new, case):
    return of_first.ppo(new, case) + case.h["ptx_coef"] * objectives.sft(new["policy"], case.batch.ptx)
