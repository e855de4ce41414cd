"""Preference pairs whose `prepare` keeps state or looks at the whole batch: over several batches, and against the definition."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import beta_dpo, tr_dpo
from rlhf_jax.objectives._pairs import pair_reading
from rlhf_jax.types import Comparisons
from tests.objectives import tabular
from tests.objectives.settings import V, bound, config, moved


def case(rows: int = 6, seed: int = 0) -> tuple[tabular.TabularNets, Comparisons]:
    rng = np.random.default_rng(seed)
    fake = tabular.nets(rng, V)
    return fake, tabular.with_reference(fake, tabular.comparisons(rng, rows, 8, V, filler=True))


def ratios(fake: tabular.TabularNets, batch: Comparisons) -> np.ndarray:
    """Log-ratios of the real pairs, [rows − 1, 2]."""
    return np.asarray(pair_reading(fake, batch, None, "test")[1][:-1], np.float64)


@pytest.mark.parametrize("name", ["bco_pair", "mpo"])
def test_the_shift_is_the_mean_of_all_rewards_so_far(name: str) -> None:
    objective, carry, seen = bound(name), bound(name).init_carry(None), []
    for seed in range(3):
        fake, batch = case(seed=seed)
        prepared, carry, _ = objective.prepare(fake, batch, carry, jax.random.key(0))
        seen += (objective.hyperparameters["beta"] * ratios(fake, batch)).ravel().tolist()
        np.testing.assert_allclose(prepared.shift, np.full(6, np.mean(seen)), rtol=1e-5)
    assert int(carry["rewards"].count) == 30


def test_aot_pairs_each_margin_with_the_references_margin_of_its_rank() -> None:
    fake, batch = case()
    prepared, _, _ = bound("aot").prepare(fake, batch, {}, jax.random.key(0))
    logps, log_ratios = (np.asarray(x[:-1]) for x in pair_reading(fake, batch, None, "aot"))
    margins, reference = logps[:, 0] - logps[:, 1], (logps - log_ratios) @ [1, -1]
    matched = np.asarray(prepared.ref_margin[:-1])
    np.testing.assert_allclose(np.sort(matched), np.sort(reference), rtol=1e-5)
    assert (np.argsort(matched) == np.argsort(margins)).all()


def test_aot_unpaired_keeps_every_response_and_no_pair_of_filler() -> None:
    fake, batch = case()
    # Row 1 lost its better branch and row 2 the other one: neither is a pair, nor are both together.
    segments = batch.seqs.segment_ids.at[1, 0].set(0).at[2, 1].set(0)
    batch = batch.replace(seqs=batch.seqs.replace(segment_ids=segments))
    prepared, _, metrics = bound("aot_unpaired").prepare(fake, batch, {}, jax.random.key(0))
    assert int(prepared.real.sum()) == int(batch.real.sum()) == 3
    before, after = ratios(fake, batch)[[0, 3, 4]], np.asarray(pair_reading(fake, prepared, None, "aot_unpaired")[1])[np.asarray(prepared.real)]
    np.testing.assert_allclose(after[:, 0], before[:, 0], rtol=1e-5)
    np.testing.assert_allclose(np.sort(after[:, 1]), np.sort(before[:, 1]), rtol=1e-5)
    assert (np.argsort(after[:, 0]) == np.argsort(after[:, 1])).all()
    np.testing.assert_allclose(metrics["reward/margin"].compute(), 0.3 * (before @ [1, -1]).mean(), rtol=1e-5)


# --- β-DPO ---


def test_beta_follows_the_gap_of_the_pairs_that_are_kept() -> None:
    beta = lambda gap: beta_dpo.dynamic_beta(jnp.float32(gap), jnp.float32(0.5), beta=0.1, alpha=0.6)  # noqa: E731
    np.testing.assert_allclose([beta(0.5), beta(1.5), beta(-100.0)], [0.1, 0.16, 1e-3], rtol=1e-6)


def test_outliers_are_left_out_and_the_draw_is_even_among_equals() -> None:
    gaps, real = jnp.asarray([0.0, 0.1, -0.1, 100.0, 0.0, 0.0]), jnp.asarray([True] * 5 + [False])
    draw = jax.jit(jax.vmap(lambda key: beta_dpo.drawn(gaps, real, jnp.float32(0.0), jnp.float32(1.0), key, keep=0.6)))
    kept = np.asarray(draw(jax.random.split(jax.random.key(0), 400)))
    assert (kept.sum(1) == 3).all() and not kept[:, 3].any() and not kept[:, 5].any()
    np.testing.assert_allclose(kept.mean(0)[[0, 1, 2, 4]], 0.75, atol=0.08)  # 3 of 4, each with a deviation of 0.02
    every = beta_dpo.drawn(gaps, real, jnp.float32(0.0), jnp.float32(0.0), jax.random.key(1), keep=1.0)
    np.testing.assert_array_equal(every, real)


def test_a_pair_is_drawn_as_often_as_its_weight_says() -> None:
    """One of three: the largest log-weight plus Gumbel noise is a draw from their softmax."""
    gaps, draws = jnp.asarray([0.0, 1.0, -2.0]), 20_000
    draw = jax.jit(jax.vmap(lambda key: beta_dpo.drawn(gaps, jnp.ones(3, bool), jnp.float32(0.5), jnp.float32(1.2), key, keep=0.34)))
    kept = np.asarray(draw(jax.random.split(jax.random.key(2), draws)))
    assert (kept.sum(1) == 1).all()
    weights = np.exp(-((np.asarray(gaps) - 0.5) ** 2) / (2 * 1.2**2))
    share = weights / weights.sum()
    assert (np.abs(kept.mean(0) - share) < 4 * np.sqrt(share * (1 - share) / draws)).all(), kept.mean(0)


def test_the_moving_statistics_of_beta_dpo() -> None:
    objective, carry, mean, std = bound("beta_dpo"), bound("beta_dpo").init_carry(None), 0.0, 0.0
    for seed in range(2):
        fake, batch = case(seed=seed)
        prepared, carry, metrics = objective.prepare(fake, batch, carry, jax.random.key(seed))
        gaps = objective.hyperparameters["beta"] * (ratios(fake, batch) @ [1, -1])
        mean, std = 0.9 * mean + 0.1 * gaps.mean(), 0.9 * std + 0.1 * gaps.std(ddof=1)
        np.testing.assert_allclose([carry["mean"], carry["std"]], [mean, std], rtol=1e-4)
        kept = np.asarray(prepared.kept[:-1])
        assert kept.sum() == 4 and not prepared.kept[-1]
        beta = max(0.3 * (1 + 0.6 * (gaps[kept].mean() - mean)), 1e-3)
        np.testing.assert_allclose([metrics["objective/beta"].compute(), prepared.beta[0]], beta, rtol=1e-4)
    empty = batch.replace(seqs=batch.seqs.replace(segment_ids=jnp.zeros_like(batch.seqs.segment_ids)))
    assert objective.prepare(fake, empty, carry, jax.random.key(0))[1] == carry


# --- TR-DPO ---


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_the_reference_moves_after_every_second_batch(alpha: float) -> None:
    objective = objectives.bind(config("tr_dpo", alpha=alpha, sync_every=2))
    fake, batch = case()
    start, carry, rng = fake.frozen["ref"], objective.init_carry(fake), np.random.default_rng(3)
    assert carry["policy"] is not start
    expected = np.asarray(start)
    for number in range(5):
        prepared, carry, _ = objective.prepare(fake, batch, carry, jax.random.key(0))
        if number in (2, 4):
            expected = alpha * np.asarray(fake.params["policy"]) + (1 - alpha) * expected
        np.testing.assert_allclose(carry["policy"], expected, rtol=1e-5, atol=1e-6)
        read = fake.replace(params={**fake.params, "policy": jnp.asarray(expected)}).policy(batch.seqs).logps
        np.testing.assert_allclose(prepared.seqs.ref_logps, read, rtol=1e-5, atol=1e-5)
        fake = moved(fake, rng)
    assert int(carry["batches"]) == 5


def test_the_reference_starts_as_the_policy_where_the_run_has_none() -> None:
    fake, _ = case()
    alone = fake.replace(frozen={})
    np.testing.assert_array_equal(tr_dpo.init_carry(alone)["policy"], fake.params["policy"])


def test_a_reference_that_is_shaped_otherwise_is_refused() -> None:
    fake, _ = case()
    with pytest.raises(UserError, match=r"config\.reference_from: tr_dpo moves the reference"):
        tr_dpo.init_carry(fake.replace(frozen={"ref": jnp.ones((2, 2))}))


def test_every_leaf_of_a_prepared_batch_leads_with_its_rows() -> None:
    fake, batch = case()
    for name in ("aot", "aot_unpaired", "bco_pair", "mpo", "beta_dpo", "tr_dpo"):
        prepared: Any = bound(name).prepare(fake, batch, bound(name).init_carry(fake), jax.random.key(0))[0]
        assert {leaf.shape[0] for leaf in jax.tree.leaves(prepared)} == {6}, name
