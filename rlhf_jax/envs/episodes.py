"""Episodes of many rows, advanced together turn by turn: the policy speaks, the environment answers, until each is over.

`play` is the host's part and knows no device: `speak` draws the next turn of every row that is still in play. A row keeps the policy's own token
ids as they were drawn; replies are tokenised as new turns by the chat template and appended. `to_rollout` makes one rollout of it: a prompt padded
on the left, then own tokens and replies in a row, of which the loss mask marks the policy's own. An environment that raises, takes too long or
returns what is no `Step` fails its row, which is over then. A turn that runs out of tokens, and an episode that runs out of turns or tokens, is
truncated; its score is what it has earned so far.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.records import Message
from rlhf_jax.envs.protocol import Environment, Step
from rlhf_jax.types import Prompts, Rollout, Sequences

REPLIES = 4096  # different replies whose tokens are kept


class Limits(NamedTuple):
    """Of an episode."""

    turns: int  # of the policy
    tokens: int  # after the prompt, the policy's and the environment's
    turn_tokens: int  # of one turn of the policy


class Spoken(NamedTuple):
    """A turn as it was drawn, [n] each."""

    tokens: np.ndarray  # int32
    logps: np.ndarray  # float32 nats, of the distribution drawn from
    plain: np.ndarray  # float32 nats, unfiltered
    ended: bool  # by a stop token or a stop string


@dataclasses.dataclass
class Episode:
    """One row. The arrays after the prompt grow together: a reply's log-probs are 0."""

    number: int  # of the row in the batch
    prompt: np.ndarray  # [n] int32
    ids: tuple[int, int, int]  # prompt, sample, group
    messages: list[Message]  # of the whole conversation; empty on filler rows
    tokens: list[int] = dataclasses.field(default_factory=list)
    own: list[bool] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    plain: list[float] = dataclasses.field(default_factory=list)
    state: Any = None
    score: float = 0.0
    turns: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    over: bool = False
    truncated: bool = False
    failed: str = ""  # why the environment has no score for it

    @property
    def generated(self) -> int:
        """The policy's own tokens so far."""
        return sum(self.own)

    def append(self, tokens: Iterable[Any], own: bool, logps: Iterable[Any], plain: Iterable[Any]) -> None:
        """One more turn, the policy's own or not."""
        before = len(self.tokens)
        self.tokens += map(int, tokens)
        self.own += [own] * (len(self.tokens) - before)
        self.logps += map(float, logps)
        self.plain += map(float, plain)


class Language:
    """Tokens to text and replies to tokens, by the policy's tokenizer and chat template."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._tokenizer = encoder, encoder.tokenizer
        self._reply = functools.lru_cache(REPLIES)(lambda messages: [int(i) for i in encoder.reply(json.loads(messages))])

    def text(self, tokens: Sequence[int]) -> str:
        """What was said, without control tokens."""
        return self._tokenizer.decode(tokens)

    def reply(self, messages: Sequence[Message], last: int) -> list[int]:
        """The tokens of replies, to the header after which the policy speaks again. A turn that a stop string ended gets its end token here: the
        policy has not drawn it, and the template's turns end with one.

        Args:
          messages: at least one.
          last: the policy's last token.

        Raises:
          UserError: the template refuses them.
        """
        ended = last in self._tokenizer.stop_ids
        return ([] if ended else [self._tokenizer.end_id]) + self._reply(json.dumps(list(messages)))


Speak = Callable[[list[Episode]], list[Spoken]]
Guard = Callable[[Callable[[], Any]], Any]  # calls; may raise TimeoutError


def begin(environment: Environment, prompts: Prompts, messages: Callable[[int], Sequence[Message]], reference: Callable[[int], Any],
          seed: Callable[[int], int], guard: Guard = lambda call: call()) -> list[Episode]:
    """An episode per row, reset; one whose environment fails, and a filler row's, is over.

    Args:
      environment: loaded.
      prompts: [B, P], NumPy leaves.
      messages, reference, seed: by prompt id.
      guard: how the environment is called.
    """
    episodes = []
    for number, ids in enumerate(zip(prompts.prompt_ids, prompts.sample_ids, prompts.group_ids, strict=True)):
        real = np.asarray(prompts.segment_ids[number]) != 0
        prompt_id, sample_id, group_id = (int(i) for i in ids)
        episode = Episode(number, np.asarray(prompts.tokens[number])[real], (prompt_id, sample_id, group_id), [])
        episodes.append(episode)
        if not real.any():
            episode.over = True
            continue
        episode.messages = list(messages(prompt_id))
        asked, beside, chance = tuple(episode.messages), reference(prompt_id), seed(prompt_id)
        try:
            episode.state = guard(functools.partial(environment.reset, asked, beside, chance))
        except Exception as error:
            _fail(episode, f"reset raised {type(error).__name__}: {error}")
    return episodes


def play(environment: Environment, episodes: list[Episode], language: Language, speak: Speak, limits: Limits, guard: Guard = lambda call: call()
         ) -> None:
    """Plays all episodes to their ends, in place.

    Args:
      environment: loaded.
      episodes: from `begin`.
      language: of the policy.
      speak: the next turn of each of some episodes, in their order, `limits.turn_tokens` at most.
      limits: of each.
      guard: how the environment is called.
    """
    while live := [episode for episode in episodes if not episode.over]:
        for episode, spoken in zip(live, speak(live), strict=True):
            _take(episode, spoken, language, limits)
            if not episode.over:
                _answer(environment, episode, language, limits, guard)


def _take(episode: Episode, spoken: Spoken, language: Language, limits: Limits) -> None:
    """The policy's turn; one that does not end within its tokens, or the episode's, ends the episode."""
    room = limits.tokens - len(episode.tokens)
    episode.append(spoken.tokens[:room], True, spoken.logps[:room], spoken.plain[:room])
    episode.turns += 1
    episode.messages.append(Message(role="assistant", content=language.text([int(i) for i in spoken.tokens[:room]])))
    if not spoken.ended or len(spoken.tokens) > room:
        episode.over = episode.truncated = True


def _answer(environment: Environment, episode: Episode, language: Language, limits: Limits, guard: Guard) -> None:
    """The environment's turn."""
    try:
        step = _checked(guard(functools.partial(environment.step, episode.state, episode.messages[-1]["content"])))
        ends = step.done or episode.turns == limits.turns
        tokens = [] if ends else language.reply(step.replies, episode.tokens[-1])
    except Exception as error:
        _fail(episode, f"step raised {type(error).__name__}: {error}")
        return
    episode.state, episode.score = step.state, episode.score + float(step.reward)
    for name, count in step.counts.items():
        episode.counts[name] = episode.counts.get(name, 0) + int(count)
    if step.done or ends or len(episode.tokens) + len(tokens) >= limits.tokens:
        episode.over, episode.truncated = True, not step.done
        return
    episode.messages += step.replies
    nothing = [0.0] * len(tokens)
    episode.append(tokens, False, nothing, nothing)


def _checked(step: Any) -> Step:
    if not isinstance(step, Step):
        raise TypeError(f"it returned {step!r:.80}, which is no Step")
    if not isinstance(step.reward, int | float | np.number) or not math.isfinite(step.reward):
        raise ValueError(f"its reward is {step.reward!r}, which is no finite number")
    if not step.done and not step.replies:
        raise ValueError("it neither replies nor is done")
    counts = step.counts
    if not isinstance(counts, Mapping) or not all(isinstance(name, str) and isinstance(count, int | np.integer) for name, count in counts.items()):
        raise TypeError(f"its counts are {counts!r:.80}, which are no whole numbers by name")
    return step


def _fail(episode: Episode, reason: str) -> None:
    episode.over, episode.failed = True, reason


def to_rollout(episodes: Sequence[Episode], limits: Limits, *, width: int, pad_id: int, version: int, failed: float) -> Rollout:
    """The episodes as one rollout, NumPy leaves.

    Args:
      episodes: over, in the order of the batch.
      limits: of each.
      width: P, slots of the prompts.
      pad_id: on padding.
      version: the iteration whose weights played.
      failed: the score of a row on which the environment failed; NaN for none.

    Returns:
      [B, P + limits.tokens]; `loss_positions` are the slots of the policy's own tokens; `scores` the sums of rewards, 0 on filler rows.
    """
    batch, length = len(episodes), width + limits.tokens
    tokens = np.full((batch, length), pad_id, np.int32)
    positions, segments = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
    mask = np.zeros((batch, length), bool)
    logps, plain = np.zeros((batch, length), np.float32), np.zeros((batch, length), np.float32)
    heads = np.zeros((batch, min(limits.tokens, limits.turns * limits.turn_tokens)), np.int32)
    for b, episode in enumerate(episodes):
        before, after = len(episode.prompt), len(episode.tokens)
        here = slice(width - before, width + after)
        tokens[b, here] = [*episode.prompt, *episode.tokens]
        positions[b, here], segments[b, here] = np.arange(before + after), 1
        for array, values in ((mask, episode.own), (logps, episode.logps), (plain, episode.plain)):
            array[b, width : width + after] = values
        own = np.flatnonzero(mask[b])
        heads[b, : len(own)] = own
    ids = np.array([episode.ids for episode in episodes], np.int32).reshape(batch, 3)
    leaves: dict[str, Any] = dict(
        sampler_logps=logps, plain_logps=plain, prompt_ids=ids[:, 0], sample_ids=ids[:, 1], group_ids=ids[:, 2],
        truncated=np.array([episode.truncated for episode in episodes], bool), version=np.full(batch, version, np.int32),
        scores=np.array([failed if episode.failed else episode.score for episode in episodes], np.float32),
    )
    seqs: dict[str, Any] = dict(tokens=tokens, positions=positions, segment_ids=segments, loss_mask=mask, loss_positions=heads)
    return Rollout(seqs=Sequences(**seqs), **leaves)


def prefixes(episodes: Sequence[Episode], *, rows: int, width: int, pad_id: int) -> tuple[Prompts, np.ndarray]:
    """What the policy reads before its next turn, padded on the left, and how many tokens of its own each row has; filler rows at the end.

    Args:
      episodes: at most `rows`.
      rows: of the batch.
      width: slots, at least the longest prefix.
      pad_id: on padding.

    Returns:
      prompts [rows, width] and [rows] int32, NumPy leaves.
    """
    tokens = np.full((rows, width), pad_id, np.int32)
    positions, segments = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    ids = np.tile(np.array([-1, 0, 0], np.int32), (rows, 1))
    generated = np.zeros(rows, np.int32)
    for b, episode in enumerate(episodes):
        row = [*episode.prompt, *episode.tokens]
        start = width - len(row)
        tokens[b, start:], positions[b, start:], segments[b, start:] = row, np.arange(len(row)), 1
        ids[b], generated[b] = episode.ids, episode.generated
    ids[len(episodes) :, 2] = rows - 1
    leaves: Mapping[str, Any] = dict(tokens=tokens, positions=positions, segment_ids=segments, prompt_ids=ids[:, 0], sample_ids=ids[:, 1],
                                     group_ids=ids[:, 2])
    return Prompts(**leaves), generated
