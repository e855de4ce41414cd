"""The papers' equations in slow float64 NumPy, one token at a time. Written from the papers, sharing nothing with the package."""

from __future__ import annotations

import math

import numpy as np


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def log_softmax(z: np.ndarray) -> np.ndarray:
    top = max(z)
    return z - (top + math.log(sum(math.exp(v - top) for v in z)))


def mean(x: np.ndarray, mask: np.ndarray) -> float:
    kept = [float(v) for v, m in zip(x.ravel(), mask.ravel()) if m]
    return sum(kept) / len(kept) if kept else 0.0


def variance(x: np.ndarray, mask: np.ndarray) -> float:
    centre = mean(x, mask)
    kept = [(float(v) - centre) ** 2 for v, m in zip(x.ravel(), mask.ravel()) if m]
    return sum(kept) / (len(kept) - 1) if len(kept) > 1 else 0.0


def whiten(x: np.ndarray, mask: np.ndarray, keep_mean: bool) -> np.ndarray:
    centre, spread = mean(x, mask), math.sqrt(variance(x, mask) + 1e-8)
    out = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        if mask[index]:
            out[index] = (x[index] - centre) / spread + (centre if keep_mean else 0.0)
    return out


def gae(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Schulman et al. 2016, eq. 16, as the sum it is: A_t = Σ_l (γλ)^l δ_{t+l}, over the tokens of the mask alone."""
    out = np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        own = [t for t in range(rewards.shape[1]) if mask[b, t]]
        deltas = []
        for i, t in enumerate(own):
            after = values[b, own[i + 1]] if i + 1 < len(own) else 0.0
            deltas.append(rewards[b, t] + gamma * after - values[b, t])
        for i, t in enumerate(own):
            out[b, t] = sum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[i:]))
    return out


def group_advantages(scores: np.ndarray, group_ids: np.ndarray, real: np.ndarray, eps: float) -> np.ndarray:
    out = np.zeros(len(scores))
    for i in range(len(scores)):
        group = [float(scores[j]) for j in range(len(scores)) if real[j] and group_ids[j] == group_ids[i]]
        if real[i] and len(set(group)) > 1:
            centre = sum(group) / len(group)
            std = math.sqrt(sum((s - centre) ** 2 for s in group) / (len(group) - 1))
            out[i] = (scores[i] - centre) / (std + eps)
    return out


def k3(log_ratio: float) -> float:
    return math.exp(-log_ratio) - 1.0 + log_ratio


KL = {"k1": lambda x: x, "k2": lambda x: 0.5 * x * x, "k3": k3}  # of x = log π − log ref


def surrogate(log_ratio: float, advantage: float, low: float, high: float) -> float:
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1.0 - low), 1.0 + high)
    return -min(ratio * advantage, clipped * advantage)


def dual_clipped(log_ratio: float, advantage: float, low: float, high: float, most: float) -> float:
    """Ye et al. 2020: −max( min(ρA, clip(ρ)A), most · A ) where A < 0."""
    loss = surrogate(log_ratio, advantage, low, high)
    return min(loss, -most * advantage) if advantage < 0 else loss


def value_loss(value: float, old: float, target: float, clip: float) -> float:
    near = old + min(max(value - old, -clip), clip)
    return 0.5 * max((value - target) ** 2, (near - target) ** 2)
