"""A number to be guessed: after every guess the policy is told whether it is higher or lower.

The row may name the range (`low`, `high`) and the number (`secret`); else the parameters say the one and the seed draws the other. A guess is the
first whole number of a turn; a turn without one, or with one of more than LONGEST digits, is told so. The reward of the right guess is
1 − `turn_cost` · (turns before it), of any other 0.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.records import Message
from rlhf_jax.envs.protocol import Step

# Whole runs of digits, so that no guess is read from the middle of another number.
_WHOLE = re.compile(r"(?<![0-9])(?<![0-9]\.)-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?!\.?[0-9])")
LONGEST = 18  # digits of a guess


@dataclasses.dataclass(frozen=True)
class State:
    """Of one game."""

    secret: int
    low: int
    high: int
    turns: int = 0  # made so far


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
    """`low` … `high`: the range where a row names none. `turn_cost`: what a turn takes off the reward. `role`: of the replies."""

    low: int = 1
    high: int = 15
    turn_cost: float = 0.0
    role: str = "user"

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low}: must be below high = {self.high}")
        if not 0 <= self.turn_cost <= 1:
            raise ValueError(f"turn_cost = {self.turn_cost}: must be in [0, 1]")

    @property
    def counters(self) -> tuple[str, ...]:
        """Guesses, and turns without a number."""
        return ("guesses", "malformed_guesses")

    def reset(self, messages: Sequence[Message], reference: Mapping[str, Any] | None, seed: int) -> State:
        """The number, drawn from the seed where the row has none. Raises ValueError for a range that is none."""
        given = dict(reference or {})
        low, high = given.get("low", self.low), given.get("high", self.high)
        secret = given.get("secret")
        whole = [value for value in (low, high, secret) if value is not None]
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in whole) or low >= high:
            raise ValueError(f"the guessing game needs whole numbers low < high, and got {reference!r}")
        secret = random.Random(seed).randint(low, high) if secret is None else secret
        if not low <= secret <= high:
            raise ValueError(f"the guessing game needs a secret from {low} to {high}, and got {secret}")
        return State(secret, low, high)

    def step(self, state: State, response: str) -> Step:
        """Higher, lower, or the end."""
        after = dataclasses.replace(state, turns=state.turns + 1)
        found = _WHOLE.search(response)
        digits = found.group().replace(",", "") if found else ""
        guessed = 0 < len(digits.lstrip("-")) <= LONGEST
        counts = {"guesses": int(guessed), "malformed_guesses": int(not guessed)}
        if not guessed:
            text = f"say a whole number from {state.low} to {state.high}"
        elif (guess := int(digits)) == state.secret:
            return Step(state=after, reward=max(1.0 - self.turn_cost * state.turns, 0.0), done=True, counts=counts)
        else:
            text = "higher" if guess < state.secret else "lower"
        return Step(state=after, replies=(Message(role=self.role, content=text),), counts=counts)
