"""NASH-MD: a policy gradient on how often the policy's samples beat those of a mixture of itself with the reference.

    L = −[ P(y ≻ y'|x) − ½ − τ log(π(y|x)/π_ref(y|x)) ] · log π(y|x),   the bracket held fixed
    y ~ π,   y' ~ π^(1−m) · π_ref^m, normalised at every token,   P(y ≻ y'|x) = σ( r(x, y) − r(x, y') )

Use: to beat any other policy rather than to raise a score; m = 0 is self-play, m = 1 the best answer to the reference.
See: Munos et al. 2023, Nash-MD-PG, section 7 (arXiv:2312.00886).
Deviation: there is no policy ratio, so keep epochs and minibatches at 1; P comes from the run's scalar score by Bradley–Terry, where the
paper has a preference model, so that preferences are transitive; scores are log-odds, hence not normalised in the config; a truncated
sample's score pays missing_eos_penalty, as in TRL (0 is the paper's). TRL weighs each token's score function by that token's log-ratio
alone (`token_kl_loss`), which is not the gradient of the KL of responses.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.objectives._online_pairs import contest_metrics, paired
from rlhf_jax.objectives._opponents import Mixture
from rlhf_jax.objectives._reference import reference_logps
from rlhf_jax.ops import vocab
from rlhf_jax.ops.masking import loss_tokens, masked_sum
from rlhf_jax.types import Array, Mean, PyTree, Rollout, Sequences

NEEDS = {"reference": "", "reward": "", "pairs": ""}
DEFAULTS = {"tau": 0.008, "mixture": 0.125, "missing_eos_penalty": 1.0}
RANGES = {"tau": (0.0, math.inf), "mixture": (0.0, 1.0), "missing_eos_penalty": (0.0, math.inf)}


class Duels(struct.PyTreeNode, kw_only=True):
    """The policy's samples, each with how likely it is preferred to the opponent's."""

    seqs: Sequences  # [B, T]; filler where either sample was, or had no score
    preference: Array  # [B] float32, P(y ≻ y'|x)

    @property
    def real(self) -> Array:
        """[B] bool; false on filler rows."""
        chex.assert_equal_shape_prefix([self.seqs.tokens, self.preference], 1)
        return self.seqs.real


def preference_loss(logps: Array, preference: Array) -> Array:
    """Unreduced −( P(y ≻ y'|x) − ½ ) log π(y|x), [B]: its gradient is that of −P(π ≻ π'), ½ the baseline that lowers the variance.

    Args:
      logps: log π(y|x), sums over the policy's samples, [B] nats.
      preference: P(y ≻ y'|x), [B], [0, 1], held fixed.

    See: Munos et al. 2023, section 7.
    """
    chex.assert_rank([logps, preference], 1)
    chex.assert_equal_shape([logps, preference])
    return -(preference - 0.5) * logps


def kl_loss(logps: Array, ref_logps: Array, *, tau: float) -> Array:
    """Unreduced τ · log(π(y|x)/π_ref(y|x)) · log π(y|x), the ratio held fixed, [B]: its expected gradient is that of τ KL(π ‖ π_ref).

    Args:
      logps: log π(y|x), sums over the policy's samples, [B] nats.
      ref_logps: log π_ref(y|x), [B] nats.
      tau: weight of the KL, probability per nat, ≥ 0.

    See: Munos et al. 2023, section 7.
    """
    chex.assert_rank([logps, ref_logps], 1)
    chex.assert_equal_shape([logps, ref_logps])
    return tau * jax.lax.stop_gradient(logps - ref_logps) * logps


def token_kl_loss(logps: Array, ref_logps: Array, mask: Array, *, tau: float) -> Array:
    """TRL's form of `kl_loss`, τ Σ_t log(π_t/π_ref,t) · log π_t, [B]: less variance, and blind to what a token does to the KL of later ones.

    Args:
      logps: log π of each token, [B, T] nats.
      ref_logps: log π_ref of each token, [B, T] nats.
      mask: [B, T] bool, the policy's own tokens.
      tau: weight of the KL, probability per nat, ≥ 0.
    """
    chex.assert_rank([logps, ref_logps, mask], 2)
    chex.assert_equal_shape([logps, ref_logps, mask])
    return tau * masked_sum(jax.lax.stop_gradient(logps - ref_logps) * logps, mask)


def opponent(nets: Any, *, mixture: float) -> Mixture:
    """The mixture of the policy with the reference.

    Args:
      nets: the networks.
      mixture: m, the reference's share in the opponent's log-probs, [0, 1].
    """
    return Mixture(nets, nets.as_reference(), mixture)


def prepare(nets: Any, batch: Rollout, carry: PyTree, key: Array, *, missing_eos_penalty: float) -> tuple[Duels, PyTree, dict[str, Mean]]:
    seqs, scores = paired(batch, missing_eos_penalty=missing_eos_penalty)
    preference = jax.nn.sigmoid((scores[:, 0] - scores[:, 1]).astype(jnp.float32))
    duels = Duels(seqs=jax.tree.map(lambda x: x[:, 0], seqs), preference=preference)
    return duels, carry, contest_metrics(batch, preference, duels.real)


def loss(nets: Any, batch: Duels, keys: Array | None, *, tau: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    mask = loss_tokens(batch.seqs)
    out = nets.policy(batch.seqs, keys, want=(vocab.logps, vocab.entropy))
    logps, ref_logps = masked_sum(out.logps, mask), masked_sum(reference_logps(batch.seqs, "nash_md"), mask)
    terms = {
        "policy": Mean.of(preference_loss(logps, batch.preference), batch.real),
        "kl": Mean.of(kl_loss(logps, ref_logps, tau=tau), batch.real),
    }
    metrics = {
        "objective/kl": Mean.of(logps - ref_logps, batch.real),
        "objective/entropy": Mean.of(out.entropy, mask),
        "logps/mean": Mean.of(out.logps, mask),
    }
    return terms, metrics
