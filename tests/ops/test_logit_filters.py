"""Filters against a slow loop: which tokens stay, ties, the ends of every range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.ops import logit_filters as filters


def slow_top_k(row, k):
    order = sorted(range(len(row)), key=lambda v: (-row[v], v))
    return set(order[:k])


def slow_top_p(row, p):
    weights = [np.exp(float(v) - float(max(row))) for v in row]
    order = sorted(range(len(row)), key=lambda v: (-row[v], v))
    kept, mass = set(), 0.0
    for v in order:
        if mass >= p * sum(weights):
            break
        kept.add(v)
        mass += weights[v]
    return kept


def kept(logits):
    return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(logits)]


LOGITS = np.random.default_rng(0).normal(size=(6, 11)).astype(np.float32) * 2
TIES = np.array([[1, 1, 1, 1, 1, 1], [0, 2, 2, 0, 2, 1], [3, 3, 0, 0, 0, 0]], np.float32)


@pytest.mark.parametrize("logits", [LOGITS, TIES])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("jitted", [False, True])
def test_top_k(logits, k, jitted):
    f = lambda z: filters.top_k(z, k=k)  # noqa: E731
    got = (jax.jit(f) if jitted else f)(jnp.asarray(logits))
    assert kept(got) == [slow_top_k(row, k) for row in logits]
    np.testing.assert_array_equal(np.where(np.isfinite(got), got, logits), logits)  # what stays is unchanged


@pytest.mark.parametrize("logits", [LOGITS, TIES])
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.62, 0.95])
@pytest.mark.parametrize("jitted", [False, True])
def test_top_p(logits, p, jitted):
    f = lambda z: filters.top_p(z, p=p)  # noqa: E731
    got = (jax.jit(f) if jitted else f)(jnp.asarray(logits))
    assert kept(got) == [slow_top_p(row, p) for row in logits]
    assert all(int(row.argmax()) in found for row, found in zip(logits, kept(got)))


def sorted_top_p(logits, p):
    """Which tokens stay, by two sorts."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    keep = (jnp.cumsum(ranked, axis=-1) - ranked < p).at[:, 0].set(True)
    return np.asarray(jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1) & (logits > -jnp.inf))


ROWS = np.random.default_rng(3)
EDGES = {
    "random": ROWS.normal(size=(40, 700)) * 3,
    "flat": ROWS.normal(size=(40, 700)) * 1e-3,
    "tied": ROWS.integers(-3, 4, size=(40, 64)) * 0.7,
    "banned": np.where(ROWS.random((40, 200)) < 0.9, -np.inf, ROWS.normal(size=(40, 200))),
    "far": np.array([[1e30, -1e30, 1e-30, -1e-30, 0.0, -0.0], [-1e4, -1e4 - 1, -2e4, -np.inf, -np.inf, -1e4], [0.0, -0.0, 0.0, -0.0, 0.0, -0.0],
                     [-np.inf] * 5 + [3.0], [5.0] * 6, [3e38, 3e38, -3e38, 0, 0, 0], [1e-40, 2e-40, 0, -1e-40, 1e-39, 3e-40]]),
}


@pytest.mark.parametrize("name", EDGES)
def test_top_p_keeps_what_sorting_keeps(name):
    """Everywhere but where the mass before a token is p itself up to rounding, which both sum in their own order."""
    logits = jnp.asarray(EDGES[name], jnp.float32)
    run = jax.jit(filters.top_p, static_argnames="p")
    for p in (1e-30, 0.07, 0.351, 0.5001, 0.9, 0.999, 1 - 1e-6):
        got, wanted = np.isfinite(np.asarray(run(logits, p=p))), sorted_top_p(logits, p)
        for row in np.flatnonzero((got != wanted).any(-1)):
            z = np.asarray(logits[row], np.float64)
            order = np.argsort(-z, kind="stable")
            weights = np.exp(z[order] - z.max())
            before = np.concatenate([[0.0], np.cumsum(weights)[:-1]]) / weights.sum()
            assert (np.abs(before - p)[(got != wanted)[row][order]] < 1e-6).all(), (name, p, row)


def test_top_p_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    assert kept(filters.top_p(logits, p=0.4)) == [{1}]
    assert kept(filters.top_p(logits, p=0.6)) == [{1, 3}]
    assert kept(filters.top_p(logits, p=0.8)) == [{1, 2, 3}]


def test_no_ops_are_decided_statically():
    logits = jnp.asarray(LOGITS)
    assert filters.top_k(logits, k=0) is logits
    assert filters.top_k(logits, k=11) is logits and filters.top_k(logits, k=99) is logits
    assert filters.top_p(logits, p=1.0) is logits
    assert filters.temperature(logits, t=1.0) is logits


def test_temperature_divides():
    np.testing.assert_allclose(filters.temperature(jnp.asarray(LOGITS), t=0.5), LOGITS * 2)


def test_removed_tokens_stay_removed_when_filters_are_chained():
    once = filters.top_k(jnp.asarray(LOGITS), k=2)
    twice = filters.top_p(once, p=0.999)
    assert all(after <= before and after for before, after in zip(kept(once), kept(twice)))


@pytest.mark.parametrize("call", [
    lambda: filters.top_k(jnp.ones((1, 3)), k=-1),
    lambda: filters.top_p(jnp.ones((1, 3)), p=0.0),
    lambda: filters.top_p(jnp.ones((1, 3)), p=1.1),
    lambda: filters.temperature(jnp.ones((1, 3)), t=0.0),
    lambda: filters.temperature(jnp.ones((1, 3)), t=1e-39),
])
def test_settings_out_of_range_name_the_config_key(call):
    with pytest.raises(UserError, match=r"sampling\."):
        call()


@pytest.mark.parametrize("call", [
    lambda: filters.top_k(jnp.ones(3), k=1),
    lambda: filters.top_p(jnp.ones((1, 2, 3)), p=0.5),
    lambda: filters.temperature(jnp.ones(3), t=1.0),
])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call()


@pytest.mark.parametrize("p", [0.02, 0.3, 1.0])
def test_min_p(p):
    for logits in (LOGITS, TIES):
        got = filters.min_p(jnp.asarray(logits), p=p)
        weights = np.exp(logits.astype(np.float64))
        assert kept(got) == [{v for v in range(len(row)) if row[v] >= p * max(row) * (1 - 1e-6)} for row in weights]
    assert filters.min_p(LOGITS, p=0) is LOGITS


def test_penalties_and_bias_against_loops():
    rng = np.random.default_rng(3)
    seen, counts, bias = rng.random(LOGITS.shape) < 0.4, rng.integers(0, 4, LOGITS.shape), rng.normal(size=LOGITS.shape[1]).astype(np.float32)
    got = [np.asarray(x) for x in (
        filters.repetition_penalty(jnp.asarray(LOGITS), jnp.asarray(seen), penalty=1.7),
        filters.count_penalty(jnp.asarray(LOGITS), jnp.asarray(counts), presence=0.3, frequency=0.0),
        filters.count_penalty(jnp.asarray(LOGITS), jnp.asarray(counts), presence=0.3, frequency=-0.2),
        filters.add_bias(jnp.asarray(LOGITS), jnp.asarray(bias)),
    )]
    for (b, v), z in np.ndenumerate(LOGITS):
        penalised = (z / 1.7 if z > 0 else z * 1.7) if seen[b, v] else z
        shown = z - (0.3 if counts[b, v] else 0)
        np.testing.assert_allclose([x[b, v] for x in got], [penalised, shown, shown + 0.2 * counts[b, v], z + bias[v]], rtol=1e-6, atol=1e-6)
    same = jnp.asarray(LOGITS)
    assert filters.repetition_penalty(same, jnp.asarray(seen), penalty=1) is same
    assert filters.count_penalty(same, jnp.asarray(counts), presence=0, frequency=0) is same


def test_a_ban_that_would_leave_nothing_is_lifted():
    banned = np.zeros(LOGITS.shape, bool)
    banned[0, :4], banned[1] = True, True
    got = filters.ban(jnp.asarray(LOGITS), jnp.asarray(banned))
    assert kept(got) == [set(range(4, 11))] + [set(range(11))] * 5
    np.testing.assert_array_equal(got[1:], LOGITS[1:])


@pytest.mark.parametrize("call", [
    lambda: filters.min_p(jnp.ones((1, 3)), p=1.1),
    lambda: filters.repetition_penalty(jnp.ones((1, 3)), jnp.ones((1, 3), bool), penalty=0.0),
])
def test_filters_out_of_range_name_the_config_key(call):
    with pytest.raises(UserError, match=r"sampling\.filters"):
        call()
