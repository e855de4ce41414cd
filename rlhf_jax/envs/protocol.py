"""The protocol of an environment: two functions on text, pure data in and out.

`reset` makes the state of an episode from a row of the prompt file and a seed, `step` takes the policy's turn as text and gives the replies, the
reward and the next state. A state is any data that pickles; an environment keeps nothing between calls and asks nothing but its seed for chance, so
that an episode can be played again, in any order beside any others, with the same end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rlhf_jax.data.records import Message

State = Any  # of one episode; it pickles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What a turn of the policy leads to."""

    state: State
    replies: tuple[Message, ...] = ()  # what the policy reads next; none when the episode is done
    reward: float = 0.0  # of this turn; an episode's score is their sum
    done: bool = False
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of this turn, by the names of `counters`


class Environment(Protocol):
    """What config.env.name stands for."""

    @property
    def role(self) -> str:
        """The role of its replies, which the chat template must know."""

    @property
    def counters(self) -> tuple[str, ...]:
        """What its steps count; logged as `env/<name>`, the mean over episodes of their sum."""

    def reset(self, messages: Sequence[Message], reference: Mapping[str, Any] | None, seed: int) -> State:
        """The state in which an episode begins.

        Args:
          messages: the prompt, which the policy has been given.
          reference: what the row of the prompt file says beside it.
          seed: the same for all samples of a prompt in one iteration, so that a group plays one and the same episode.

        Raises:
          ValueError: the row is none of this environment's; anything else that is raised counts as its failure too.
        """

    def step(self, state: State, response: str) -> Step:
        """What the policy's turn leads to. Whatever the text is, it is answered: a failure here is the environment's own.

        Args:
          state: from `reset` or the step before.
          response: without control tokens.
        """
