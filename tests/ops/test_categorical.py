"""Draws against exact probabilities, and tokens of probability zero at both ends of every uniform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import categorical
from tests.models import tiny

ENDS = (0.0, np.float32(2**-23), 0.5, np.float32(1 - 2**-24), 1.0)  # 1 is no uniform; it stands for what rounds up to the total
WILSON = 3.719  # upper 1e-4 point of the normal distribution


def critical(freedom: int) -> float:
    """The upper 1e-4 point of χ², by Wilson and Hilferty's cube."""
    return freedom * (1 - 2 / (9 * freedom) + WILSON * (2 / (9 * freedom)) ** 0.5) ** 3


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def statistic(counts: np.ndarray, exact: np.ndarray) -> tuple[float, int]:
    """χ² with rare tokens pooled, and its degrees of freedom; what has no probability must not occur."""
    assert not counts[exact == 0].any()
    expected = exact * counts.sum()
    rare = expected < 5
    found, wanted = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    return float(((found - wanted) ** 2 / wanted).sum()), len(wanted) - 1


@pytest.mark.parametrize("method", [categorical.gumbel, categorical.inversion])
@pytest.mark.parametrize("vocabulary", [7, 100, 1500])
def test_frequencies_are_the_probabilities(method, vocabulary):
    """χ² of 40 000 draws at a level of 1e-4; every third token is banned. And the log-prob is the drawn token's."""
    logits = np.random.default_rng(vocabulary).normal(size=vocabulary).astype(np.float32) * 2
    logits[::3] = -np.inf
    exact, draws = softmax(logits), 40_000
    run = tiny.jit(lambda keys: jax.lax.map(lambda k: method(k, jnp.broadcast_to(logits, (1000, vocabulary))), keys.reshape(-1, 1000)))
    tokens, logps = (np.asarray(x).reshape(-1) for x in run(jax.random.split(jax.random.key(5), draws)))
    found, freedom = statistic(np.bincount(tokens, minlength=vocabulary), exact)
    assert found < critical(freedom), (found, freedom)
    np.testing.assert_allclose(logps, np.log(exact[tokens]), atol=2e-5)
    uniform = np.where(exact > 0, 1 / (exact > 0).sum(), 0)
    assert statistic(np.bincount(tokens, minlength=vocabulary), uniform)[0] > 10 * critical(freedom)  # the test can fail


def test_a_vocabulary_of_128k_is_drawn_with_its_probabilities():
    """χ² over 256 strided and 256 neighbouring pools of tokens, and over the likeliest tokens one by one."""
    vocabulary, draws = 131_072, 20_480
    logits = np.random.default_rng(0).normal(size=vocabulary).astype(np.float32) * 2.5
    logits[np.random.default_rng(1).integers(0, vocabulary, vocabulary // 2)] = -np.inf
    exact = softmax(logits)
    run = tiny.jit(lambda keys: jax.lax.map(lambda k: categorical.inversion(k, jnp.asarray(logits)[None].repeat(8, 0)), keys.reshape(-1, 8)))
    tokens, logps = (np.asarray(x).reshape(-1) for x in run(jax.random.split(jax.random.key(6), draws)))
    assert np.isfinite(logits[tokens]).all()
    np.testing.assert_allclose(logps, np.log(exact[tokens]), atol=5e-5)
    likely = np.argsort(-exact)[:64]
    every = np.arange(vocabulary)
    for pool in (every % 256, every // 512, np.where(np.isin(every, likely), every, 0)):
        found, freedom = statistic(np.bincount(pool[tokens], minlength=pool.max() + 1), np.bincount(pool, exact))
        assert found < critical(freedom), (found, freedom)


@pytest.mark.parametrize("vocabulary", [5, 64, 1000, 131_072])
def test_tokens_without_probability_are_never_drawn_at_either_end(vocabulary):
    """Legal ones alone at the beginning, the end or amid; rounding must find no way to a banned neighbour."""
    rng = np.random.default_rng(vocabulary)
    rows = []
    for legal in ([0], [vocabulary - 1], [vocabulary // 2], [0, vocabulary - 1], rng.choice(vocabulary, max(vocabulary // 50, 2), replace=False)):
        row = np.full(vocabulary, -np.inf, np.float32)
        row[legal] = rng.normal(size=len(legal)) * 20
        rows.append(row)
    rows.append(np.where(np.arange(vocabulary) % 7 == 3, -np.inf, rng.normal(size=vocabulary) * 0.01).astype(np.float32))
    grid = [(row, u, v) for row in range(len(rows)) for u in ENDS for v in ENDS]
    run = tiny.jit(categorical.invert)
    for begin in range(0, len(grid), 25):
        part = grid[begin : begin + 25]
        logits = jnp.asarray(np.stack([rows[row] for row, _, _ in part]))
        tokens, logps = run(jnp.asarray([(u, v) for _, u, v in part], jnp.float32), logits)
        assert np.isfinite(np.asarray(logits)[np.arange(25), tokens]).all() and np.isfinite(logps).all()
    for row, only in zip(rows[:3], (0, vocabulary - 1, vocabulary // 2)):  # all mass on one token
        token, logp = run(jnp.full((25, 2), 0.3), jnp.broadcast_to(row, (25, vocabulary)))
        assert (np.asarray(token) == only).all() and not np.asarray(logp).any()


def test_the_distribution_function_is_inverted_in_order():
    """By hand: blocks are strided, V = 4 in two blocks {0, 2} and {1, 3}."""
    logits = jnp.log(jnp.asarray([[0.1, 0.2, 0.3, 0.4]]))
    for (u, v), token in {(0.0, 0.0): 0, (0.39, 0.24): 0, (0.39, 0.26): 2, (0.41, 0.32): 1, (0.41, 0.34): 3, (0.99, 0.99): 3}.items():
        found, logp = categorical.invert(jnp.asarray([[u, v]], jnp.float32), logits)
        assert int(found[0]) == token and float(logp[0]) == pytest.approx(float(logits[0, token]), abs=1e-6)


def test_a_row_draws_the_same_in_any_company():
    logits, keys = 2 * jax.random.normal(jax.random.key(0), (9, 3000)), jax.random.split(jax.random.key(1), 9)
    together = categorical.inversion(keys, logits)[0]
    alone = jnp.concatenate([categorical.inversion(keys[b : b + 1], logits[b : b + 1])[0] for b in range(9)])
    np.testing.assert_array_equal(together, alone)
    assert len(set(together.tolist())) > 5


def test_the_method_is_chosen_by_backend_and_size():
    assert categorical.method(8192, "cpu") == "inversion" and categorical.method(100, "cpu") == categorical.method(8192, "tpu") == "gumbel"
    logits, keys = jnp.zeros((2, 8192)), jax.random.split(jax.random.key(1), 2)
    np.testing.assert_array_equal(categorical.draw(keys, logits)[0], categorical.inversion(keys, logits)[0])
    np.testing.assert_array_equal(categorical.draw(keys, logits[:, :100])[0], categorical.gumbel(keys, logits[:, :100])[0])


def test_the_likeliest_is_the_first_of_the_largest():
    logits = np.random.default_rng(0).integers(-3, 4, (50, 9)).astype(np.float32)
    logits[::5, :4] = -np.inf
    np.testing.assert_array_equal(categorical.likeliest(jnp.asarray(logits)), logits.argmax(-1))
    assert categorical.likeliest(jnp.full((1, 5), -jnp.inf)).tolist() == [0]


def test_logits_that_are_nan_give_a_token_of_the_vocabulary_and_a_log_prob_that_is_nan():
    logits = jnp.zeros((3, 1500)).at[0].set(jnp.nan).at[1, 7].set(jnp.nan)
    for method in (categorical.inversion, categorical.gumbel):
        tokens, logps = method(jax.random.split(jax.random.key(1), 3), logits)
        assert (tokens >= 0).all() and (tokens < 1500).all() and np.isnan(logps).tolist() == [True, True, False]


def test_wrong_shapes_are_refused():
    keys = jax.random.split(jax.random.key(0), 2)
    for call in (lambda: categorical.draw(keys, jnp.zeros(3)), lambda: categorical.likeliest(jnp.zeros(3)),
                 lambda: categorical.gumbel(keys[0], jnp.zeros((2, 3))),
                 lambda: categorical.invert(jnp.zeros((2, 1)), jnp.zeros((2, 3)))):
        with pytest.raises(AssertionError):
            call()
