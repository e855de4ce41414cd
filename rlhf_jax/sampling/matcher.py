"""Finds texts in a row of tokens while it is drawn, wherever the tokens' borders fall.

The texts make one automaton over bytes (Aho and Corasick 1975): a state is the longest beginning of some text that what has been said so far ends
with. Run over the bytes of every token from every state, it becomes a table of states and tokens that is read once per token inside the compiled
decode. Tokens that lead to the same states share a column, which leaves few: most tokens of a vocabulary have nothing of the texts in them. Before
any column is made, tokens are told apart only by what the texts can see of them: bytes of no text are all one, and what lies between two of those
matters where it holds a whole text.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import chex
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.types import Array

_BYTES = 256
CELLS = 1 << 26  # of a table, 4 bytes each


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
      UserError: a text that no row of tokens can contain, or texts whose table would take too much memory.
    """
    needles = [text.encode() for text in texts]
    sayable = set().union(*map(set, spelling))
    for text, needle in zip(texts, needles):
        if missing := sorted(set(needle) - sayable):
            letter = bytes(missing[:1])
            raise UserError(f"{key} has {text!r}, which this tokenizer never writes (no token holds the byte {letter!r}): take it out")
    delta, seen = _automaton(needles), _visible(needles)
    kinds: dict[bytes, list[int]] = collections.defaultdict(list)  # what is visible of a token → the tokens
    for token in range(vocab_size):
        kinds[seen(spelling[token]) if token < len(spelling) else b""].append(token)
    numbers: dict[bytes, int] = {}
    columns = np.zeros(vocab_size, np.int32)
    for kind, tokens in kinds.items():
        column = np.arange(len(delta), dtype=np.int32)
        for byte in kind:
            column = delta[column, byte]
        columns[tokens] = numbers.setdefault(column.tobytes(), len(numbers))
        if len(numbers) * len(delta) > CELLS:
            raise UserError(f"{key} has {len(texts)} texts of {sum(map(len, needles))} bytes, whose table for this vocabulary takes more than "
                            f"{CELLS >> 18} MiB: name fewer, or shorter ones")
    return Matcher(np.stack([np.frombuffer(column, np.int32) for column in numbers], axis=1), columns)


def _visible(needles: Sequence[bytes]) -> Callable[[bytes], bytes]:
    """A function that leaves of a token's bytes what decides where it leads from every state."""
    used = set().union(*needles)
    other = next((byte for byte in range(_BYTES) if byte not in used), None)
    if other is None:
        return bytes
    table, gap = bytes(byte if byte in used else other for byte in range(_BYTES)), bytes([other])

    def seen(token: bytes) -> bytes:
        first, *between = token.translate(table).split(gap)
        return gap.join([first, *(part for part in between[:-1] if any(needle in part for needle in needles)), *between[-1:]])

    return seen


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
