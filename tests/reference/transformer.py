"""A decoder-only transformer in slow float64 NumPy, one query at a time. Written from the papers, sharing nothing with the package.

RMSNorm: Zhang & Sennrich 2019, eq. 4. RoPE: Su et al. 2021, eq. 15, as 2 × 2 rotations of the pairs (i, i + d/2), which is Llama's
convention. Grouped-query attention: Ainslie et al. 2023, query head h reads group ⌊h / (H/G)⌋. SwiGLU: Shazeer 2020, eq. 6.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """x [D]."""
    return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + eps) * gain


def rope(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """x [d] rotated by position · θ^(−2i/d) in the plane of features i and i + d/2."""
    half, out = len(x) // 2, np.array(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        out[i], out[i + half] = rotation @ np.array([x[i], x[i + half]])
    return out


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """query [d] over the keys [n, d] that it may see."""
    scores = [float(query @ key) / math.sqrt(len(query)) for key in keys]
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return sum(w * v for w, v in zip(weights, values)) / sum(weights)


def hidden(tree: Any, tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray, *, heads: int, kv_heads: int, head_dim: int,
           theta: float, eps: float) -> np.ndarray:
    """Final hidden states of one row, [T, D]; NaN on padding.

    Args:
      tree: canonical parameters, float64.
      tokens, positions, segments: [T].
    """
    x = [tree["ends"]["embedding"][token].copy() for token in tokens]
    for number in range(len(tree["layers"])):
        layer = tree["layers"][str(number)]
        normed = [rms_norm(v, layer["attention_norm"]["scale"], eps) for v in x]
        split = lambda v, name, n: (v @ layer[name]["kernel"]).reshape(n, head_dim)  # noqa: B023, E731
        queries = [[rope(h, p, theta) for h in split(v, "query", heads)] for v, p in zip(normed, positions)]
        keys = [[rope(h, p, theta) for h in split(v, "key", kv_heads)] for v, p in zip(normed, positions)]
        values = [split(v, "value", kv_heads) for v in normed]
        for t in range(len(tokens)):
            seen = [s for s in range(t + 1) if segments[s] == segments[t] != 0]
            if not seen:
                continue
            mixed = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                mixed.append(attention(queries[t][head], [keys[s][group] for s in seen], [values[s][group] for s in seen]))
            x[t] = x[t] + np.concatenate(mixed) @ layer["output"]["kernel"]
            h = rms_norm(x[t], layer["mlp_norm"]["scale"], eps)
            x[t] = x[t] + (silu(h @ layer["gate"]["kernel"]) * (h @ layer["up"]["kernel"])) @ layer["down"]["kernel"]
    rows = [rms_norm(v, tree["ends"]["norm"]["scale"], eps) if s else np.full_like(v, np.nan) for v, s in zip(x, segments)]
    return np.stack(rows)
