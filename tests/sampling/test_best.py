"""Best-of-n: which sample is chosen, ties and missing scores, and how far it moves the policy."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sampling

NAN, INF = math.nan, math.inf


def test_the_best_of_each_group_with_all_scores() -> None:
    scores = jnp.asarray([1.0, 3.0, 2.0, -5.0, -7.0, -6.0])
    best = jax.jit(lambda s: sampling.best_of(s, n=3))(scores)
    assert best.row.tolist() == [1, 3] and best.score.tolist() == [3.0, -5.0]
    np.testing.assert_array_equal(best.scores, np.asarray(scores).reshape(2, 3))
    assert sampling.best_of(scores, n=1).row.tolist() == list(range(6))


@pytest.mark.parametrize(("scores", "chosen", "worth"), [
    ([2.0, 2.0, 1.0], 0, 2.0), ([1.0, 2.0, 2.0], 1, 2.0), ([NAN, -9.0, NAN], 1, -9.0), ([NAN, -INF, NAN], 1, -INF), ([NAN, NAN, NAN], 0, NAN),
    ([NAN, 4.0, 4.0], 1, 4.0), ([INF, 1.0, INF], 0, INF),
])
def test_a_tie_goes_to_the_first_and_no_score_never_wins(scores: list[float], chosen: int, worth: float) -> None:
    best = sampling.best_of(jnp.asarray(scores), n=3)
    assert best.row.tolist() == [chosen]
    np.testing.assert_array_equal(best.score, np.float32([worth]))


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("responses", [2, 5, 40])
def test_the_bound_on_the_kl_holds_and_is_approached(n: int, responses: int) -> None:
    """Every outcome of n draws of a small policy is enumerated through `best_of`; of many distinct responses the bound is nearly reached."""
    policy = np.random.default_rng(responses).dirichlet(np.ones(responses)) if responses < 40 else np.full(responses, 1 / responses)
    worth = np.random.default_rng(1).permutation(responses).astype(np.float32)
    if responses == 40:  # the distribution of the best of n by its distribution function, P(rank ≤ k)^n
        below = np.cumsum(policy[np.argsort(worth)])
        best = np.diff(np.concatenate([[0.0], below**n]))
        base = policy[np.argsort(worth)]
    else:
        draws = np.array(list(itertools.product(range(responses), repeat=n)))
        rows = np.asarray(sampling.best_of(jnp.asarray(worth[draws].reshape(-1)), n=n).row)
        best = np.bincount(draws.reshape(-1)[rows], weights=policy[draws].prod(1), minlength=responses)
        base = policy
    kl = float((best[best > 0] * np.log(best[best > 0] / base[best > 0])).sum())
    bound = sampling.kl_bound(n)
    assert bound == pytest.approx(math.log(n) - (n - 1) / n) and -1e-9 <= kl <= bound + 1e-9
    assert responses < 40 or n == 1 or kl > 0.9 * bound


def test_wrong_shapes_are_refused() -> None:
    for scores, n in ((jnp.zeros((2, 3)), 3), (jnp.zeros(5), 3)):
        with pytest.raises(AssertionError):
            sampling.best_of(scores, n=n)
