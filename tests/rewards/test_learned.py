"""The learned reward is read at the last real token, wherever the padding stands."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import learned
from rlhf_jax.types import Rollout, Sequences


class TokenScores:
    """A network whose score at t is 10 · t + token: tells which place was read."""

    def reward(self, seqs, keys=None):
        scores = 10.0 * jnp.arange(seqs.tokens.shape[1])[None, :] + seqs.tokens
        return types.SimpleNamespace(scores=scores.astype(jnp.bfloat16).astype(jnp.float32))


jax.tree_util.register_pytree_node(TokenScores, lambda nets: ((), None), lambda _, __: TokenScores())


def rollout(segment_ids, tokens):
    segment_ids, tokens = jnp.asarray(segment_ids), jnp.asarray(tokens)
    rows = tokens.shape[0]
    zeros = jnp.zeros(tokens.shape)
    seqs = Sequences(tokens=tokens, positions=jnp.zeros_like(tokens), segment_ids=segment_ids, loss_mask=segment_ids != 0)
    ids = jnp.arange(rows)
    return Rollout(
        seqs=seqs, sampler_logps=zeros, prompt_ids=ids, sample_ids=ids, group_ids=ids, truncated=jnp.zeros(rows, bool), version=ids
    )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_score_reads_the_last_real_token(wrap):
    segments = [[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    tokens = [[9, 1, 2, 9], [1, 2, 3, 4], [9, 9, 5, 9], [9, 9, 9, 9]]
    scores = wrap(learned.score)(TokenScores(), rollout(segments, tokens))
    np.testing.assert_array_equal(scores, [22.0, 34.0, 25.0, 0.0])
    assert scores.dtype == jnp.float32


def test_wrong_shapes_are_refused():
    good = rollout([[1, 1]], [[1, 2]])
    with pytest.raises(AssertionError):
        learned.score(TokenScores(), good.replace(seqs=jax.tree.map(lambda x: x[0], good.seqs)))
    short = types.SimpleNamespace(reward=lambda seqs, keys=None: types.SimpleNamespace(scores=jnp.zeros((1, 3))))
    with pytest.raises(AssertionError):
        learned.score(short, good)
    with pytest.raises(AssertionError):
        learned.normalise(jnp.zeros((2, 2)), 0.0, 1.0)


def test_moments_normalise_their_own_reference_set():
    scores = np.random.default_rng(0).normal(3.0, 2.0, 500).astype(np.float32)
    mean, std = learned.reference_moments(scores)
    assert mean == pytest.approx(sum(map(float, scores)) / 500) and std == pytest.approx(np.std(scores.astype(np.float64)))
    normal = jax.jit(learned.normalise)(jnp.asarray(scores), mean, std)
    assert float(normal.mean()) == pytest.approx(0.0, abs=1e-5) and float(normal.std()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0, 2.0], [1e6, 1e6 + 0.5], [1.0, float("nan")], [1.0, float("inf")]])
def test_a_reference_set_without_moments_is_refused(scores):
    with pytest.raises(UserError, match="reward normalisation"):
        learned.reference_moments(scores)
