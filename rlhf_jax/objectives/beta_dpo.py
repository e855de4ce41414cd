"""β-DPO: DPO whose β follows the batch's reward gap, on the pairs whose gap is near the usual one.

    L = −log σ( β_b [ log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) ] )   over the pairs that are kept
    β_b = β [ 1 + α ( mean of M over the pairs kept − M₀ ) ],   M = β log π(y_w|x)/π_ref(y_w|x) − β log π(y_l|x)/π_ref(y_l|x)
    M₀ ← m M₀ + (1 − m) mean(M),   s ← m s + (1 − m) std(M);   kept: a share ρ, drawn with weights exp( −(M − M₀)² / 2s² )

Use: data of mixed quality: batches of wide gaps are held closer to the reference, outliers are left out.
See: Wu et al. 2024, section 4 (arXiv:2407.08639).
Deviation: none from the paper; M₀ and s start at 0 and take the batch in before they are used, β_b is at least 1e-3, and s is std(M) with n − 1,
as in the authors' code. There M leaves β out, so its α is 1/β times as strong. Statistics and draws are over the global batch. In validation
pairs are drawn too.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives._pairs import pair_metrics, pair_reading
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.ops.masking import masked_mean, masked_moments
from rlhf_jax.types import Array, Comparisons, Mean, PyTree

NEEDS = {"reference": ""}
DEFAULTS = {"beta": 0.1, "alpha": 0.6, "keep": 0.8, "momentum": 0.9}
RANGES = {"beta": (1e-6, math.inf), "alpha": (0.0, math.inf), "keep": (0.0, 1.0), "momentum": (0.0, 1.0)}
LEAST_BETA = 1e-3


class SelectedComparisons(Comparisons, kw_only=True):
    """Pairs, which of them train, and the batch's β."""

    kept: Array  # [B] bool
    beta: Array  # [B] float32


def drawn(gaps: Array, real: Array, mean: Array, std: Array, key: Array, *, keep: float) -> Array:
    """Which pairs are kept: a share of the real ones, at least one, without replacement, with Gaussian weights, [B] bool.

    The largest log-weights plus Gumbel noise are such a draw; a row's noise depends on its number alone.

    Args:
      gaps: M, [B].
      real: [B] bool.
      mean: M₀, [].
      std: s, []; 0 makes all weights equal.
      key: of this batch.
      keep: ρ, share of the pairs that are kept, [0, 1].

    See: Wu et al. 2024, section 4.
    """
    chex.assert_rank([gaps, real, mean, std], [1, 1, 0, 0])
    chex.assert_equal_shape([gaps, real])
    noise = jax.vmap(lambda row: jax.random.gumbel(jax.random.fold_in(key, row)))(jnp.arange(gaps.shape[0]))
    weights = -0.5 * jnp.square((gaps - mean) / jnp.where(std > 0, std, jnp.inf))
    rank = jnp.argsort(jnp.argsort(-jnp.where(real, weights + noise, -jnp.inf)))
    count = jnp.floor(keep * real.sum() + 1e-4)  # 0.7 · 10 is 7
    return real & (rank < jnp.maximum(count, 1))


def dynamic_beta(gap: Array, mean: Array, *, beta: float, alpha: float) -> Array:
    """β_b = β [1 + α (gap − M₀)], at least 1e-3, [].

    Args:
      gap: mean of M over the pairs that are kept, [].
      mean: M₀, [].
      beta: β where the gap is the usual one, > 0.
      alpha: how strongly β follows the gap, ≥ 0; 0 = not at all. The authors' code takes the gap without β: 0.6/β reproduces its 0.6.

    See: Wu et al. 2024, section 4.
    """
    chex.assert_rank([gap, mean], 0)
    return jnp.maximum(beta * (1.0 + alpha * (gap - mean)), LEAST_BETA)


def init_carry(nets: Any) -> PyTree:
    return {"mean": jnp.float32(0.0), "std": jnp.float32(0.0)}


def prepare(
    nets: Any, batch: Comparisons, carry: PyTree, key: Array, *, beta: float, alpha: float, keep: float, momentum: float
) -> tuple[SelectedComparisons, PyTree, dict[str, Mean]]:
    """Statistics, draw and β of the batch.

    Args:
      momentum: m, of the moving averages M₀ and s, [0, 1].
    """
    _, ratios = pair_reading(nets, batch, None, "beta_dpo")
    gaps, real = beta * (ratios[:, 0] - ratios[:, 1]), batch.real
    mean, variance = masked_moments(gaps, real)
    fresh = {"mean": mean, "std": jnp.sqrt(variance)}
    averaged = {name: momentum * carry[name] + (1.0 - momentum) * fresh[name] for name in fresh}
    carry = jax.tree.map(lambda new, old: jnp.where(real.any(), new, old), averaged, carry)
    kept = drawn(gaps, real, carry["mean"], carry["std"], key, keep=keep)
    used = dynamic_beta(masked_mean(gaps, kept), carry["mean"], beta=beta, alpha=alpha)
    batch_beta = jnp.broadcast_to(used, real.shape)
    return SelectedComparisons(seqs=batch.seqs, margin=batch.margin, kept=kept, beta=batch_beta), carry, {"objective/beta": Mean.of(used)}


def loss(nets: Any, batch: SelectedComparisons, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    logps, ratios = pair_reading(nets, batch, keys, "beta_dpo")
    margins = batch.beta[:, None] * ratios
    losses = dpo_loss(margins[:, 0], margins[:, 1], beta=1.0)
    return {"beta_dpo": Mean.of(losses, batch.kept)}, pair_metrics(logps, beta * ratios, batch)
