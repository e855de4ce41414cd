"""The pytrees that every room of the house shares.

Alignment (law 1): a quantity of token `t` sits at `t`. `logps[b, t] = log p(tokens[b, t] | earlier tokens of its segment)`, zero at
pads and at each segment's first token. Padding is `segment_ids == 0` (law 2). Every leaf leads with B, so that a batch is split,
permuted or sharded by one `tree.map`. Axis letters: B rows, K branches, T tokens, R loss positions, P prompt tokens.
"""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
PyTree = Any


class Purpose(enum.IntEnum):
    """What a key folded from the run's key is for. It is folded in first, so that no two uses ever meet (law 6)."""

    INIT = 0
    SHUFFLE = 1
    DROPOUT = 2
    PREPARE = 3
    ROLLOUT = 4
    VALIDATION = 5
    REPLAY = 6


class Sequences(struct.PyTreeNode, kw_only=True):
    """Token rows. With K branches every [B, T] below reads [B, K, T]."""

    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32, restart at 0 in every segment
    segment_ids: Array  # [B, T] int32, 0 = padding, segments count from 1
    loss_mask: Array  # [B, T] bool, tokens whose log-prob is trained on
    ref_logps: Array | None = None  # [B, T] float32 nats, the reference's log-probs
    loss_positions: Array | None = None  # [B, R] int32, where the head runs; padded with 0; None = everywhere
    # (G, P): each G neighbours hold the same first P slots, and nothing before slot P is trained on or read: a network computes those slots once for
    # the G. Rows that are moved apart must lose it (ops/rows.py); rows that only seem to share their beginning read NaN. None = nothing is known.
    prefix: tuple[int, int] | None = struct.field(pytree_node=False, default=None)

    @property
    def real(self) -> Array:
        """[B] bool; false on filler rows, which hold padding only."""
        return (self.segment_ids != 0).any(-1)


class Comparisons(struct.PyTreeNode, kw_only=True):
    """K responses to one prompt, best first; a pair is K = 2. A ranking of fewer responses than K ends in empty branches."""

    seqs: Sequences  # tokens [B, K, T]
    margin: Array | None = None  # [B] float32, how much better the first one was said to be

    @property
    def real(self) -> Array:
        """[B] bool; a comparison is real when its first two branches are. Which of a ranking's branches are empty says `seqs.real`."""
        return self.seqs.real[..., :2].all(-1)


class Unpaired(struct.PyTreeNode, kw_only=True):
    """Single responses, each said to be good or bad."""

    seqs: Sequences  # [B, T]
    desirable: Array  # [B] bool
    kl_seqs: Sequences | None = None  # [B, T], row i's prompt with another row's response: KTO's estimate of the KL
    baseline: Array | None = None  # [B] float32 nats, the reward that a response is compared with; `prepare` fills it in

    @property
    def real(self) -> Array:
        """[B] bool; false on filler rows."""
        return self.seqs.real


class Labelled(struct.PyTreeNode, kw_only=True):
    """Token rows with numbers to predict at some tokens: a rating at the last one, or the verdict on each step at its end."""

    seqs: Sequences  # [B, T]
    targets: Array  # [B, T] float32
    weights: Array  # [B, T] float32 ≥ 0; 0 = no label here

    @property
    def real(self) -> Array:
        """[B] bool; false on filler rows."""
        return self.seqs.real


class Prompts(struct.PyTreeNode, kw_only=True):
    """What a rollout starts from: prompts padded on the left, so that every row generates into the same slots."""

    tokens: Array  # [B, P] int32
    positions: Array  # [B, P] int32
    segment_ids: Array  # [B, P] int32, 0 on the left padding
    prompt_ids: Array  # [B] int32, identity of the prompt in its data set; keys the randomness
    sample_ids: Array  # [B] int32, which of the prompt's samples this row is
    group_ids: Array  # [B] int32, dense in [0, B); rows of one prompt share it
    ptx: Sequences | None = None  # [B, T'], rows of another data set, which go with the prompts into the rollout

    @property
    def real(self) -> Array:
        """[B] bool; false on filler rows."""
        return (self.segment_ids != 0).any(-1)


class Rollout(struct.PyTreeNode, kw_only=True):
    """Sampled completions and all that is known of them. Three log-probs, never confused: `sampler_logps` of the distribution
    drawn from (filters included), `old_logps` of the trainer at the same temperature, and the new ones that a loss computes.
    `plain_logps` are the sampler's own reading of what `old_logps` will be: unfiltered, at the sampling temperature."""

    seqs: Sequences  # [B, T], T = P + new tokens; loss_mask marks the policy's own tokens
    sampler_logps: Array  # [B, T] float32 nats
    prompt_ids: Array  # [B] int32
    sample_ids: Array  # [B] int32
    group_ids: Array  # [B] int32, dense in [0, B)
    truncated: Array  # [B] bool, the budget ran out before a stop token
    version: Array  # [B] int32, the iteration whose weights sampled the row
    plain_logps: Array | None = None  # [B, T] float32 nats, at temperature 1 where decoding was greedy
    scores: Array | None = None  # [B] float32, one reward per completion
    components: Array | None = None  # [B, C] float32, the rewards that it was made of, as they were given; not finite where one failed
    old_logps: Array | None = None  # [B, T] float32 nats
    values: Array | None = None  # [B, T] float32, V before token t
    rewards: Array | None = None  # [B, T] float32
    advantages: Array | None = None  # [B, T] float32
    returns: Array | None = None  # [B, T] float32
    ptx: Sequences | None = None  # [B, T'], rows of another data set that are trained on beside the rollout

    @property
    def real(self) -> Array:
        """[B] bool; false on filler rows."""
        return self.seqs.real


class TrainState(struct.PyTreeNode, kw_only=True):
    """All that training changes, and all that a checkpoint needs. Frozen networks travel beside it."""

    step: Array  # [] int32, optimizer updates, those that were not finite included
    batch_index: Array  # [] int32, batches consumed; also the iteration of a rollout
    params: PyTree  # only what trains: {"policy": …} or {"reward": …}, and {"critic": …} for an actor-critic
    opt_state: PyTree
    key: Array  # typed key of the run; counters are folded in, it never advances
    carry: PyTree  # an objective's own state, e.g. a KL controller
    online: PyTree = None  # rollouts in flight, prompt cursor, replay, moving reference (train.rollouts.Online); None where there is none of it


class Mean(struct.PyTreeNode):
    """A mean kept as (total, count) until the very end, so that microbatches, devices and hosts merge exactly."""

    total: Array  # [] float32
    count: Array  # [] float32

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> Mean:
        """Sum of `values` where `mask`, with the mask's sum. A masked value may be anything, NaN included.

        Args:
          values: any shape.
          mask: same shape, bool or non-negative weights; None counts every entry.
        """
        values = values.astype(jnp.float32)
        if mask is None:
            return cls(values.sum(), jnp.float32(values.size))
        if mask.shape != values.shape:
            raise AssertionError(f"Mean.of: mask {mask.shape} and values {values.shape} differ in shape")
        weights = mask.astype(jnp.float32)
        return cls((jnp.where(weights != 0, values, 0.0) * weights).sum(), weights.sum())

    def merge(self, other: Mean) -> Mean:
        """The mean over both sets of entries."""
        return Mean(self.total + other.total, self.count + other.count)

    def compute(self) -> Array:
        """total / count, with 1 in place of a zero count."""
        return self.total / jnp.where(self.count == 0, 1.0, self.count)


class Tail(Mean):
    """A quantile or a maximum among Means: how many entries lie above each of fixed thresholds, counts that merge exactly by addition as Means do.

    Read off when all is merged (`settled`), it is the smallest threshold that no more than 1 − q of the entries exceed: at most 7 % above the
    entry, 0 exactly where no entry is positive; 1e-6 and 60, the thresholds' ends, stand for what is nearer to 0 and for what is beyond.
    """

    above: Array  # [THRESHOLDS] float32, entries greater than each threshold
    q: float = struct.field(pytree_node=False)  # (0, 1]; 1 = the largest entry
    exponential: bool = struct.field(pytree_node=False, default=False)  # entries are logarithms; read off is e to their power

    @classmethod
    def at(cls, q: float, values: Array, mask: Array, *, exponential: bool = False) -> Tail:
        """Of `values` where `mask`.

        Args:
          q: (0, 1]; 1 = the largest entry.
          values: any shape; a negative one counts as 0.
          mask: same shape, bool.
          exponential: values are logarithms, and the quantile of e^value is meant.
        """
        mean = Mean.of(values, mask)
        # Entry x exceeds the thresholds 0 … b − 1, b = how many lie below it: a histogram of b, summed from its end.
        below = jnp.minimum(jnp.searchsorted(_thresholds(), values.astype(jnp.float32), side="left"), THRESHOLDS - 1)  # a NaN lies beyond all
        counts = jnp.zeros(THRESHOLDS + 1, jnp.float32).at[below.reshape(-1)].add(mask.reshape(-1).astype(jnp.float32))
        return cls(mean.total, mean.count, jnp.cumsum(counts[::-1])[::-1][1:], q=q, exponential=exponential)

    def merge(self, other: Mean) -> Tail:
        """The tail of both sets of entries."""
        if not isinstance(other, Tail):
            raise AssertionError("a tail merges with a tail")
        return jax.tree.map(jnp.add, self, other)

    def compute(self) -> Array:
        """The quantile, 0 (e⁰) where nothing was counted."""
        reached = jnp.argmax(self.above <= (1.0 - self.q) * self.count)  # the last threshold is infinite
        value = jnp.minimum(_thresholds()[reached], FARTHEST)
        return jnp.exp(value) if self.exponential else value


THRESHOLDS, NEAREST, FARTHEST = 256, 1e-6, 60.0  # of a Tail: 0, then in geometric steps of 7 %, then infinity


def _thresholds() -> Array:
    inner = np.geomspace(NEAREST, FARTHEST, THRESHOLDS - 2)
    return jnp.asarray(np.concatenate([[0.0], inner, [np.inf]]), jnp.float32)


def merged(first: dict[str, Mean], second: dict[str, Mean]) -> dict[str, Mean]:
    """The metrics of two parts of something, those that both have as one.

    Args:
      first, second: by name.
    """
    return {**first, **{name: first[name].merge(mean) if name in first else mean for name, mean in second.items()}}


def settled(metrics: dict[str, Mean]) -> dict[str, Mean]:
    """The metrics with every quantile read off, for those who know Means alone.

    Args:
      metrics: merged over everything that they are merged over.
    """
    return {name: Mean(jnp.asarray(m.compute(), jnp.float32), jnp.float32(1.0)) if isinstance(m, Tail) else m for name, m in metrics.items()}
