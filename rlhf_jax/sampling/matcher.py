"""Finds texts in a row of tokens while it is drawn, wherever the tokens' borders fall.

The texts make one automaton over bytes (Aho and Corasick 1975): a state is the longest beginning of some text that what has been said so far ends
with. Run over the bytes of every token from every state, it becomes a table of states and tokens that is read once per token inside the compiled
decode. Tokens that lead to the same states share a column, which leaves few: most tokens of a vocabulary have nothing of the texts in them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import chex
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.types import Array

_BYTES = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Matcher:
    """The table; state 0 is the start, the last one is reached where a text is complete and never left."""

    table: np.ndarray  # [S, C] int32, the next state
    columns: np.ndarray  # [V] int32, the column of each token

    @property
    def found(self) -> int:
        """The state of having found a text."""
        return len(self.table) - 1

    def step(self, state: Array, token: Array) -> Array:
        """The states after one more token per row, [B] int32.

        Args:
          state, token: [B] int32.
        """
        chex.assert_equal_shape([state, token])
        return jnp.asarray(self.table)[state, jnp.asarray(self.columns)[token]]

    def completing(self, state: Array) -> Array:
        """[B, V] bool, the tokens that would complete a text; none where one has been found.

        Args:
          state: [B] int32.
        """
        chex.assert_rank(state, 1)
        hits = (self.table == self.found) & (np.arange(len(self.table)) < self.found)[:, None]
        return jnp.asarray(hits)[state][:, jnp.asarray(self.columns)]


def build(texts: Sequence[str], spelling: Sequence[bytes], vocab_size: int, key: str) -> Matcher:
    """A matcher of `texts` in rows of tokens.

    Args:
      texts: to be found, none empty.
      spelling: the bytes of each token (data/spelling.py).
      vocab_size: V, at least as many; ids without a spelling add nothing.
      key: the config key that named the texts, for messages.

    Raises:
      UserError: a text that no row of tokens can contain.
    """
    needles = [text.encode() for text in texts]
    sayable = set().union(*map(set, spelling))
    for text, needle in zip(texts, needles):
        if missing := sorted(set(needle) - sayable):
            letter = bytes(missing[:1])
            raise UserError(f"{key} has {text!r}, which this tokenizer never writes (no token holds the byte {letter!r}): take it out")
    delta = _automaton(needles)
    states = len(delta)
    table = np.repeat(np.arange(states, dtype=np.int32)[:, None], vocab_size, axis=1)
    lengths = np.zeros(vocab_size, np.int64)
    lengths[: len(spelling)] = [len(token) for token in spelling]
    order = np.argsort(-lengths, kind="stable")
    for at in range(int(lengths.max(initial=0))):
        live = order[: np.searchsorted(-lengths[order], -at)]  # tokens with more than `at` bytes
        byte = np.array([spelling[token][at] for token in live])
        table[:, live] = delta[table[:, live], byte[None, :]]
    columns, inverse = np.unique(table, axis=1, return_inverse=True)
    return Matcher(np.ascontiguousarray(columns), inverse.reshape(-1).astype(np.int32))


def _automaton(needles: Sequence[bytes]) -> np.ndarray:
    """[S, 256] int32: the next state by state and byte; the last state stands for every complete needle and leads to itself."""
    children: list[dict[int, int]] = [{}]
    complete = [False]
    for needle in needles:
        node = 0
        for byte in needle:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                complete.append(False)
            node = children[node][byte]
        complete[node] = True
    delta = np.zeros((len(children), _BYTES), np.int32)
    fallback = [0] * len(children)
    queue = collections.deque([0])
    while queue:
        node = queue.popleft()
        complete[node] |= complete[fallback[node]]
        delta[node] = delta[fallback[node]] if node else 0
        for byte, child in children[node].items():
            fallback[child] = int(delta[node, byte])
            delta[node, byte] = child
            queue.append(child)
    ends = np.asarray(complete)
    number = np.where(ends, (~ends).sum(), np.cumsum(~ends) - 1).astype(np.int32)
    found = np.full((1, _BYTES), (~ends).sum(), np.int32)
    return np.concatenate([number[delta[~ends]], found])
