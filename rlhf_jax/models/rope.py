"""Rotary position embedding and the ways in which its frequencies are stretched.

    frequency_i = θ^(−2i/r),  i < r/2;  features i and i + r/2 are rotated by position · frequency_i

The frequencies are worked out on the host, once per network: they depend on the configuration alone. `dynamic` and `longrope` frequencies depend
on the length of the text past the original context, which a compiled program does not know: ModelConfig refuses such a context.

See: Su et al. 2021, eq. 15 (arXiv:2104.09864); position interpolation, Chen et al. 2023 (arXiv:2306.15595); YaRN, Peng et al. 2023
(arXiv:2309.00071); LongRoPE, Ding et al. 2024 (arXiv:2402.13753).
"""

from __future__ import annotations

import math

import chex
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.config import ModelConfig, RopeScaling
from rlhf_jax.types import Array

Tables = tuple[Array, Array]  # cos and sin, each [B, T, 1, r/2] float32


def frequencies(rotary: int, theta: float, scaling: RopeScaling | None, context: int) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, [r/2] float32, and the factor of cos and sin.

    Args:
      rotary: r, features that are rotated; even.
      theta: base of the frequencies.
      scaling: how they are stretched; None = not.
      context: tokens of the network's rows; the original context where `scaling` does not state it.
    """
    plain = (1.0 / np.float32(theta) ** (np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary))).astype(np.float32)
    if scaling is None:
        return plain, 1.0
    original = scaling.original_context or context
    if scaling.kind == "linear":
        return plain / np.float32(scaling.factor), 1.0
    if scaling.kind == "dynamic":  # within the original context nothing is stretched
        return plain, 1.0
    if scaling.kind == "longrope":
        return plain / np.asarray(scaling.short_factors, np.float32), scaling.attention_factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling, original), 1.0
    return _yarn(plain, theta, rotary, scaling, original), scaling.attention_factor


def _llama3(plain: np.ndarray, scaling: RopeScaling, original: int) -> np.ndarray:
    """Wavelengths above original / low are stretched, those below original / high are not, and between the two it fades."""
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = original * plain.astype(np.float64) / (2 * math.pi)  # within the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1.0 - keep) * plain / scaling.factor + keep * plain).astype(np.float32)


def _yarn(plain: np.ndarray, theta: float, rotary: int, scaling: RopeScaling, original: int) -> np.ndarray:
    """Pairs that turn more than beta_fast times within the original context stay, those below beta_slow are stretched, a ramp between."""

    def pair(turns: float) -> float:  # the (fractional) pair that turns so often
        return rotary * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary - 1)
    ramp = np.clip((np.arange(rotary // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return (plain / scaling.factor * ramp + plain * (1.0 - ramp)).astype(np.float32)


def tables(config: ModelConfig, positions: Array) -> dict[bool, Tables]:
    """cos and sin of every position, by whether a layer has a window; empty where positions are learned.

    Args:
      config: the network.
      positions: [B, T] int32.
    """
    chex.assert_rank(positions, 2)
    if config.position != "rope":
        return {}
    whole = _tables(positions, *frequencies(config.rotary, config.rope_theta, config.rope_scaling, config.context))
    local = whole
    if config.local_rope_theta and any(config.windows):
        local = _tables(positions, *frequencies(config.rotary, config.local_rope_theta, None, config.context))
    return {False: whole, True: local}


def _tables(positions: Array, per_position: np.ndarray, factor: float) -> Tables:
    angles = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(per_position)[None, None, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Array, tables: Tables) -> Array:
    """Rotates the feature pairs (i, i + r/2) of the first r features, Llama's convention; the others stay.

    Args:
      x: [B, T, H, d].
      tables: cos and sin, [B, T, 1, r/2] float32.
    """
    chex.assert_rank([x, *tables], 4)
    cos, sin = tables
    rotary = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :rotary].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if rotary == x.shape[-1] else jnp.concatenate([turned, x[..., rotary:]], axis=-1)
