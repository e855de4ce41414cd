"""Whole objectives in slow float64 NumPy, over the tabular networks of tests/objectives/tabular.py, one row and token at a time.

Each takes tables and a batch of NumPy leaves and returns the scalar Σ_terms total / count that training minimises.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.reference import maths


def predecessor(segments: np.ndarray, t: int) -> bool:
    """Whether token t has a token of its own segment before it."""
    return t > 0 and segments[t] != 0 and segments[t - 1] == segments[t]


def logps(table: np.ndarray, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
    out = np.zeros(len(tokens))
    for t in range(len(tokens)):
        if predecessor(segments, t):
            out[t] = maths.log_softmax(table[tokens[t - 1]])[tokens[t]]
    return out


def loss_tokens(seqs: Any, index: Any) -> list[int]:
    segments, wanted = seqs.segment_ids[index], seqs.loss_mask[index]
    return [t for t in range(len(segments)) if wanted[t] and predecessor(segments, t)]


def real(seqs: Any, b: Any) -> bool:
    return bool((seqs.segment_ids[b] != 0).any())


def sft(table: np.ndarray, seqs: Any, z_loss: float = 0.0, label_smoothing: float = 0.0) -> float:
    total, count = 0.0, 0
    for b in range(seqs.tokens.shape[0]):
        for t in loss_tokens(seqs, b):
            logits = table[seqs.tokens[b, t - 1]]
            lse = math.log(sum(math.exp(v) for v in logits))
            for v, log_p in enumerate(maths.log_softmax(logits)):
                label = (1.0 - label_smoothing) * (v == seqs.tokens[b, t]) + label_smoothing / len(logits)
                total -= label * log_p
            total += z_loss * lse**2
            count += 1
    return total / max(count, 1)


def dpo(table: np.ndarray, ref: np.ndarray, batch: Any, beta: float) -> float:
    losses = []
    for b in range(batch.seqs.tokens.shape[0]):
        if not (real(batch.seqs, (b, 0)) and real(batch.seqs, (b, 1))):
            continue
        ratios = []
        for k in (0, 1):
            tokens, segments = batch.seqs.tokens[b, k], batch.seqs.segment_ids[b, k]
            own = loss_tokens(batch.seqs, (b, k))
            ratios.append(sum((logps(table, tokens, segments) - logps(ref, tokens, segments))[t] for t in own))
        losses.append(-maths.log_sigmoid(beta * (ratios[0] - ratios[1])))
    return sum(losses) / max(len(losses), 1)


def reward(table: np.ndarray, batch: Any, center_coef: float) -> float:
    """The tabular reward after a token is the sum of the table over its row's tokens so far."""
    losses = []
    for b in range(batch.seqs.tokens.shape[0]):
        if not (real(batch.seqs, (b, 0)) and real(batch.seqs, (b, 1))):
            continue
        r = [sum(table[v] for v, s in zip(batch.seqs.tokens[b, k], batch.seqs.segment_ids[b, k]) if s) for k in (0, 1)]
        margin = 0.0 if batch.margin is None else float(batch.margin[b])
        losses.append(-maths.log_sigmoid(r[0] - r[1] - margin) + center_coef * (r[0] + r[1]) ** 2)
    return sum(losses) / max(len(losses), 1)


def ppo_prepare(table: np.ndarray, critic: np.ndarray, ref: np.ndarray, batch: Any, kl_coef: float, h: dict[str, Any]) -> dict[str, Any]:
    rows, length = batch.seqs.tokens.shape
    old, values, rewards = np.zeros((rows, length)), np.zeros((rows, length)), np.zeros((rows, length))
    mask, kls = np.zeros((rows, length), bool), []
    for b in range(rows):
        tokens, segments = batch.seqs.tokens[b], batch.seqs.segment_ids[b]
        own = loss_tokens(batch.seqs, b)
        old[b], reference = logps(table, tokens, segments), logps(ref, tokens, segments)
        for t in own:
            mask[b, t] = True
            rewards[b, t] = -kl_coef * maths.KL[h["kl_estimator"]](old[b, t] - reference[t])
        for t in range(length):
            values[b, t] = critic[tokens[t - 1]] if predecessor(segments, t) else 0.0
        if own:
            score = min(max(h["reward_scale"] * batch.scores[b], -h["reward_clip"]), h["reward_clip"])
            rewards[b, own[-1]] += score - (h["missing_eos_penalty"] if batch.truncated[b] else 0.0)
        if real(batch.seqs, b):
            kls.append(sum(old[b, t] - reference[t] for t in own))
    if h["whiten_rewards"]:
        rewards = maths.whiten(rewards, mask, keep_mean=True)
    advantages = maths.gae(rewards, values, mask, h["gamma"], h["lam"])
    kl = sum(kls) / len(kls)
    error = min(max(kl / h["kl_target"] - 1.0, -0.2), 0.2)
    return {
        "old": old, "values": values, "mask": mask, "rewards": rewards, "kl": kl, "returns": np.where(mask, advantages + values, 0.0),
        "advantages": maths.whiten(advantages, mask, keep_mean=False), "kl_coef": kl_coef * (1.0 + error * len(kls) / h["kl_horizon"]),
    }


def ppo(table: np.ndarray, critic: np.ndarray, batch: Any, fixed: dict[str, Any], h: dict[str, float]) -> float:
    total, count = 0.0, 0
    for b in range(batch.seqs.tokens.shape[0]):
        tokens, segments = batch.seqs.tokens[b], batch.seqs.segment_ids[b]
        new = logps(table, tokens, segments)
        for t in loss_tokens(batch.seqs, b):
            log_p = maths.log_softmax(table[tokens[t - 1]])
            entropy = -sum(math.exp(v) * v for v in log_p)
            total += maths.dual_clipped(new[t] - fixed["old"][b, t], fixed["advantages"][b, t], h["clip"], h["clip"], h["dual_clip"])
            total += h["value_coef"] * maths.value_loss(
                critic[tokens[t - 1]], fixed["values"][b, t], fixed["returns"][b, t], h["value_clip"]
            )
            total -= h["entropy_coef"] * entropy
            count += 1
    return total / max(count, 1)
