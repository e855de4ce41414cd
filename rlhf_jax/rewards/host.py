"""Rewards that need the host: a user's Python function, and a reward model that reads text through a tokenizer of its own.

Flow, function: a dotted path is imported and its signature tried before training starts; each call gets messages, response texts and
references, and what it returns is checked (one finite number per response). Flow, foreign reward model: prompt and response are
rendered by the reward model's chat template, tokenized by its tokenizer, cut at the end of turn (which is kept exactly when the
response ended), padded to a bucket and scored by a jitted function that is passed in.
Deviation: the usual tooling re-tokenizes decoded special tokens as text; here a response's text is data, and only the template writes
control tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.records import Message
from rlhf_jax.dotted import imported
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.deadline import call_within
from rlhf_jax.types import Array, Sequences

Messages = Sequence[Message]
RewardFn = Callable[[list[list[Message]], list[str], list[dict[str, Any] | None]], Sequence[Any]]  # numbers, or `Failed`


def load_reward_fn(dotted: str, key: str = "config.reward_fn", parameters: Mapping[str, Any] | None = None) -> RewardFn:
    """The user's function behind `package.module.function` (or `package.module:function`).

    Args:
      dotted: the path; its module must be importable.
      key: the config key that messages name.
      parameters: keyword arguments that it gets in every call.

    Returns:
      `(prompts, responses, references) -> rewards`: lists of one length; a prompt is its messages, a reference the data file's object.

    Raises:
      UserError: no such module or attribute, an error on import, not callable, or not callable with three arguments.
    """
    function = imported(dotted, key, "function", "my_rewards.length")
    keywords = dict(parameters or {})
    if not callable(function) or not _takes_three(function, keywords):
        also = f" with {', '.join(keywords)}" if keywords else ""
        raise UserError(f"{key} expected a function (prompts, responses, references){also} -> rewards, got {dotted!r}; change its arguments")
    return functools.partial(function, **keywords) if keywords else function


@dataclasses.dataclass(frozen=True)
class Failed:
    """What a reward function returns for a row that it cannot judge, in place of a number."""

    reason: str


def call_reward_fn(
    function: RewardFn,
    prompts: Sequence[Messages],
    responses: Sequence[str],
    references: Sequence[dict[str, Any] | None],
    *,
    key: str = "config.reward_fn",
    failures: dict[int, str] | None = None,
    timeout: float = 0.0,
    each: bool = False,
) -> np.ndarray:
    """The rewards of real rows, checked. The function gets copies of the lists, so that it cannot change the caller's.

    Args:
      function: from `load_reward_fn`.
      prompts: B conversations that wait for an answer.
      responses: B texts.
      references: B objects of the data file, or None.
      key: the config key that messages name.
      failures: gets the reason of each row without a reward, by row; None: the first failure is an error. A row fails alone where its own value is
        not a finite number or `Failed`, with all others of its call where the call raised, took too long or returned another number of values.
      timeout: seconds a call may take; 0 = as long as it takes.
      each: one call per row.

    Returns:
      [B] float32, finite; NaN on the rows in `failures`.

    Raises:
      UserError: the function failed, with no `failures` to note it in; names the first bad sample.
    """
    count = len(responses)
    if not len(prompts) == count == len(references):
        raise ValueError(f"call_reward_fn: {len(prompts)} prompts, {count} responses, {len(references)} references")
    values = np.zeros(count, np.float32)
    for rows in [range(i, i + 1) for i in range(count)] if each else [range(count)] if count else []:
        _call_on(function, rows, (prompts, responses, references), values, key, failures, timeout)
    return values


def _call_on(function: RewardFn, rows: range, samples: tuple[Sequence[Any], Sequence[Any], Sequence[Any]], values: np.ndarray, key: str,
             failures: dict[int, str] | None, timeout: float) -> None:
    """One call, its values or the reasons of their absence written at `rows`."""
    prompts, responses, references = ([column[row] for row in rows] for column in samples)
    show = lambda row: _show(samples[0][row], samples[1][row])  # noqa: E731

    def fail(row: int, reason: str, sentence: str, cause: Exception | None = None) -> None:
        if failures is None:
            raise UserError(sentence) from cause
        failures[row], values[row] = reason, np.nan

    try:
        rewards = list(call_within(timeout, lambda: function([list(prompt) for prompt in prompts], responses, references)))
    except Exception as error:
        reason = f"raised {type(error).__name__}: {error}"
        for row in rows:
            fail(row, reason, f"{key} {reason}; it was given {len(rows)} samples, the first being {show(rows[0])}", error)
        return
    if len(rewards) != len(rows):
        for row in rows:
            fail(row, f"returned {len(rewards)} rewards for {len(rows)} responses",
                 f"{key} expected {len(rows)} rewards, one per response, got {len(rewards)}; return a number for each, 0.0 if need be")
        return
    for row, reward in zip(rows, rewards):
        number = _as_number(reward)
        if isinstance(reward, Failed):
            fail(row, reward.reason, f"{key} failed on sample {row}, {show(row)}: {reward.reason}; set config.reward_failure.policy to go on")
        elif number is None:
            fail(row, f"returned {reward!r}",
                 f"{key} expected finite numbers, got {reward!r} for sample {row}, {show(row)}; return a finite float for it")
        else:
            values[row] = number


def response_tokens(encoder: Encoder, prompt: Messages, response: str, ended: bool) -> np.ndarray:
    """The conversation as the reward model's own tokens, up to the response's end of turn.

    Args:
      encoder: of the reward model: its tokenizer, template, context length and `overlong` policy.
      prompt: the messages before the response.
      response: the policy's text, without control tokens.
      ended: whether the policy stopped by itself. The end-of-turn token is kept exactly then.

    Returns:
      [n] int32.

    Raises:
      UserError: longer than the reward model's context, unless `encoder.overlong` is "truncate"; or the template refuses.
    """
    messages = (*prompt, Message(role="assistant", content=response))
    tokens, mask = encoder.conversation(messages, context=len(prompt))
    # The encoder has checked that the last token that the assistant says is the end of turn; a template may write layout behind it.
    end = int(np.flatnonzero(mask)[-1])
    tokens = tokens[: end + 1] if ended else tokens[:end]
    if len(tokens) > encoder.max_length and encoder.overlong != "truncate":
        raise UserError(
            f"config.reward_from: prompt and response take {len(tokens)} tokens of the reward model's tokenizer, and its context is "
            f"{encoder.max_length}; lower config.sampling.max_new_tokens, or set the reward model's data.overlong to 'truncate'"
        )
    return tokens[: encoder.max_length]


def padded_rows(rows: Sequence[np.ndarray], *, bucket: int, max_length: int, pad_id: int) -> Sequences:
    """Rows padded on the right to a length from a small set, so that a jitted function sees few shapes.

    Args:
      rows: B token rows, at most `max_length` long; an empty one is a filler row.
      bucket: T is a multiple of it, but at most max_length; tokens.
      max_length: tokens.
      pad_id: written on padding.

    Returns:
      [B, T] NumPy leaves, nothing under the loss mask.
    """
    longest = max([1, *map(len, rows)])
    length = min(-(-longest // bucket) * bucket, max_length)
    tokens = np.full((len(rows), length), pad_id, np.int32)
    segments = np.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], segments[index, : len(row)] = row, 1
    positions = np.arange(length, dtype=np.int32) * segments
    mask = np.zeros(tokens.shape, bool)
    return Sequences(tokens=tokens, positions=positions, segment_ids=segments, loss_mask=mask)  # type: ignore[arg-type]


class RetokenisedReward:
    """A reward model with a tokenizer other than the policy's.

    Args:
      encoder: the reward model's.
      score: `Sequences` [B, T] -> [B] scores: puts the NumPy leaves where they belong on the mesh and calls a jitted function,
        e.g. `learned.score_sequences` with the networks bound.
      bucket: T is padded to multiples of it, tokens; there are at most max_length / bucket compilations.
    """

    def __init__(self, encoder: Encoder, score: Callable[[Sequences], Array], *, bucket: int) -> None:
        if bucket < 1:
            raise ValueError(f"RetokenisedReward: bucket={bucket} must be ≥ 1")
        self.encoder, self.score, self.bucket = encoder, score, bucket

    def __call__(self, prompts: Sequence[Messages | None], responses: Sequence[str], ended: Sequence[bool]) -> np.ndarray:
        """Scores of B responses; B is the same in every call, filler rows included, so that nothing is compiled anew.

        Args:
          prompts: B conversations that wait for an answer; None on filler rows.
          responses: B texts.
          ended: B, whether each response stopped by itself.

        Returns:
          [B] float32, zero on filler rows.

        Raises:
          UserError: as `response_tokens`.
        """
        if not len(prompts) == len(responses) == len(ended):
            raise ValueError(f"RetokenisedReward: {len(prompts)} prompts, {len(responses)} responses, {len(ended)} endings")
        none = np.zeros(0, np.int32)
        rows = [
            none if prompt is None else response_tokens(self.encoder, prompt, response, bool(stop))
            for prompt, response, stop in zip(prompts, responses, ended)
        ]
        seqs = padded_rows(rows, bucket=self.bucket, max_length=self.encoder.max_length, pad_id=self.encoder.tokenizer.pad_id)
        scores = np.asarray(jax.device_get(self.score(seqs)), np.float32)
        return np.where([prompt is not None for prompt in prompts], scores, np.float32(0.0))


def _takes_three(function: Callable, keywords: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(function).bind([], [], [], **keywords)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature: only the call can tell
        return True
    return True


def _as_number(reward: Any) -> float | None:
    """The reward as a float, or None where it is no finite number that float32 holds."""
    if isinstance(reward, str | bytes | Failed) or reward is None:
        return None
    try:
        number = float(reward)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and abs(number) <= float(np.finfo(np.float32).max) else None


def _show(prompt: Messages, response: str) -> str:
    asked = prompt[-1]["content"] if prompt else ""
    shorten = lambda text: text if len(text) <= 80 else text[:77] + "..."  # noqa: E731
    return f"prompt {shorten(asked)!r} with response {shorten(response)!r}"
