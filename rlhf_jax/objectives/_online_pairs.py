"""What the objectives on judged pairs of samples share: neighbouring rows of a rollout become pairs, the one with the higher score first.

Rows 2i and 2i + 1 are samples of one prompt (NEEDS "pairs": config.sampling.group_size is even); where an objective has an opponent, it drew the
second. All of this runs in `prepare`, over the global batch (law 3), and what comes out leads with B/2. Rows are paired by a reshape, which needs
no communication on a sharded batch.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.objectives._pairs import pair_metrics
from rlhf_jax.objectives._reference import reference_logps
from rlhf_jax.objectives._rollouts import known_scores, penalised, raw_scores, rollout_metrics
from rlhf_jax.ops import vocab
from rlhf_jax.ops.masking import loss_tokens, masked_sum
from rlhf_jax.types import Array, Comparisons, Mean, PyTree, Rollout, Sequences


class JudgedPairs(struct.PyTreeNode, kw_only=True):
    """Two samples of each prompt, the preferred one first."""

    seqs: Sequences  # [B, 2, T]
    tied: Array  # [B] bool, equal scores: no preference, hence no gradient
    own: Array  # [B, 2] bool, which branches the policy drew itself

    @property
    def real(self) -> Array:
        """[B] bool; a pair is real when both samples are real and have a score."""
        chex.assert_shape(self.seqs.tokens, (None, 2, None))
        return self.seqs.real.all(-1)

    @property
    def preferences(self) -> Comparisons:
        """The pairs that were told apart; ties are filler."""
        chex.assert_equal_shape_prefix([self.tied, self.own, self.seqs.tokens], 1)
        told = (self.real & ~self.tied)[:, None, None]
        return Comparisons(seqs=self.seqs.replace(segment_ids=jnp.where(told, self.seqs.segment_ids, 0)))


def neighbours(rows: PyTree) -> PyTree:
    """[B, …] → [B/2, 2, …]: rows 2i and 2i + 1 side by side.

    Args:
      rows: leaves that lead with B, an even number.
    """
    for leaf in jax.tree.leaves(rows):
        chex.assert_is_divisible(leaf.shape[0], 2)
    return jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), rows)


def paired(batch: Rollout, *, missing_eos_penalty: float) -> tuple[Sequences, Array]:
    """The two samples of each pair side by side, [B/2, 2, T], and their scores, [B/2, 2]; filler and 0 where either sample is, or has no score.

    Args:
      batch: the rollout, B rows.
      missing_eos_penalty: subtracted from a truncated sample's score before it is judged, ≥ 0; 0 = none.

    Raises:
      UserError: the rollout was not scored.
    """
    chex.assert_rank([batch.seqs.tokens, batch.truncated], [2, 1])
    raw, known = known_scores(batch)
    scores = penalised(raw, batch.truncated, missing_eos_penalty=missing_eos_penalty)
    seqs, scores, known = neighbours((batch.seqs, scores, known))
    both = known.all(-1, keepdims=True)
    # Branches may be reordered or taken alone from here on, and pairs without scores are blanked: their prompts are no longer their neighbours'.
    return seqs.replace(segment_ids=jnp.where(both[..., None], seqs.segment_ids, 0), prefix=None), jnp.where(both, scores, 0.0)


def judge(seqs: Sequences, scores: Array, *, opponent: bool) -> JudgedPairs:
    """Pairs, each ordered by its scores.

    Args:
      seqs: [B, 2, T].
      scores: [B, 2].
      opponent: whether the second sample of each pair was drawn by another than the policy.
    """
    chex.assert_equal_shape_prefix([seqs.tokens, scores], 2)
    swapped = scores[:, 1] > scores[:, 0]

    def order(x: Array) -> Array:
        return jnp.where(swapped.reshape(-1, *[1] * (x.ndim - 1)), x[:, ::-1], x)

    own = order(jnp.broadcast_to(jnp.array([True, not opponent]), scores.shape))
    return JudgedPairs(seqs=jax.tree.map(order, seqs), tied=scores[:, 0] == scores[:, 1], own=own)


def prepare(
    nets: Any, batch: Rollout, carry: PyTree, key: Array, *, missing_eos_penalty: float
) -> tuple[JudgedPairs, PyTree, dict[str, Mean]]:
    """Pairs of which the policy drew both samples, for the objectives without an opponent.

    Args:
      nets: unused.
      batch: the rollout.
      carry: passed on.
      key: unused.
      missing_eos_penalty: subtracted from a truncated sample's score before it is judged, ≥ 0; 0 = none.
    """
    pairs = judge(*paired(batch, missing_eos_penalty=missing_eos_penalty), opponent=False)
    return pairs, carry, rollout_metrics(batch, raw_scores(batch)) | tie_metrics(pairs)


def judged_reading(nets: Any, batch: JudgedPairs, keys: Array | None, objective: str, *, beta: float) -> tuple[Array, Array, dict[str, Mean]]:
    """Log-probs of both samples and their log-ratios to the reference, with the metrics of the pairs.

    Args:
      nets: the networks.
      batch: the pairs.
      keys: [B] typed keys for dropout, or None.
      objective: who asks, for errors.
      beta: scales log-ratios to implicit rewards.

    Returns:
      log π(y|x) and log π(y|x) − log π_ref(y|x), sums over the response, [B, 2] nats each, the preferred sample first; metrics, those of
      rewards over the pairs that were told apart, those of the policy over its own samples.
    """
    chex.assert_equal_shape_prefix([batch.own, batch.seqs.tokens], 2)
    out = nets.policy(batch.seqs, keys, want=(vocab.logps, vocab.entropy))
    mask = loss_tokens(batch.seqs)
    logps = masked_sum(out.logps, mask)
    ratios = logps - masked_sum(reference_logps(batch.seqs, objective), mask)
    told, own = batch.preferences, batch.own & batch.real[:, None]
    metrics = pair_metrics(logps, beta * ratios, told) | {
        "objective/kl": Mean.of(ratios, own),
        "objective/entropy": Mean.of(out.entropy, mask & own[..., None]),
    }
    return logps, ratios, metrics


def without_ties(losses: Array, batch: JudgedPairs) -> Mean:
    """Mean over all pairs of the batch, ties giving 0: a prompt weighs the same however many others were told apart.

    Args:
      losses: [B].
      batch: the pairs.
    """
    chex.assert_equal_shape([losses, batch.tied])
    return Mean.of(jnp.where(batch.tied, 0.0, losses), batch.real)


def tie_metrics(pairs: JudgedPairs) -> dict[str, Mean]:
    """The fraction of pairs without a preference.

    Args:
      pairs: from `judge`.
    """
    chex.assert_rank(pairs.tied, 1)
    return {"rollout/ties": Mean.of(pairs.tied, pairs.real)}


def contest_metrics(batch: Rollout, preference: Array, real: Array) -> dict[str, Mean]:
    """The rollout's metrics over the policy's own samples, the opponent's score, and how often the policy's are preferred.

    Args:
      batch: the rollout, B rows, the odd ones drawn by the opponent.
      preference: [B/2], for the policy's sample over the opponent's, [0, 1].
      real: [B/2] bool, pairs of which both samples have a score.
    """
    chex.assert_equal_shape([preference, real])
    own, other = (jax.tree.map(lambda x, k=k: x[:, k], neighbours(batch)) for k in (0, 1))
    scores, known = known_scores(other)
    return rollout_metrics(own, raw_scores(own)) | {
        "rollout/unscored": Mean.of(~known_scores(batch)[1], batch.real),  # the opponent's too
        "objective/opponent_score": Mean.of(scores, known),
        "objective/preference": Mean.of(preference, real),
    }
