"""A conversation with a saved policy: what has been said becomes tokens, the answer comes back piece by piece.

`Speaker` keeps one row's KV cache between turns: of a new prompt only the tokens behind the longest beginning in common with the cached ones are
prefilled, padded on the right to one of two widths, and answers are decoded a few tokens per program. The cache doubles its slots when it is full, so
that a conversation of any length compiles a handful of programs. What lies in slots behind the last token is never seen, and overwritten later.
`Chat` renders the messages as training does, forgets the oldest turns when the context is full, and turns tokens into text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax import sampling, sharding
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.records import Message, Messages
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.eval.models import Policy
from rlhf_jax.models import ModelConfig, transformer
from rlhf_jax.models import cache as kv
from rlhf_jax.types import Array, Prompts, PyTree

WIDTHS = (16, 256)  # tokens of a prefill
STEPS = 8  # tokens of a decode
FEWEST = 256  # slots of the first cache
SLACK = max(*WIDTHS, STEPS)  # slots behind the context, into which padding may be written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn; as in sampling.pick."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    filters: sampling.Filters = sampling.NONE  # and stop strings, which end an answer with the token that completes one


class Speaker:
    """One row of a policy, its cache kept between prompts.

    Args:
      policy: on its devices.
      stop_ids: tokens that end an answer.
      settings: how tokens are drawn.
    """

    def __init__(self, policy: Policy, stop_ids: Sequence[int], settings: Sampling) -> None:
        self.policy, self.stop_ids, self.settings = policy, frozenset(stop_ids), settings
        self.stopped = False  # whether the last answer ended by a stop token or a stop string
        self.prefilled = 0  # tokens of the last prompt that were not in the cache
        self._known: list[int] = []  # tokens whose keys and values lie in the first slots
        self._cache: Any = None
        self._slots = 0

    def answer(self, prompt: Sequence[int] | np.ndarray, turn: int) -> Iterator[int]:
        """The tokens of an answer as they are drawn, the stop token last if there was one; at most settings.max_new_tokens.

        The first turn draws what `sampling.generate` draws for prompt 0, sample 0 of the same seed.

        Args:
          prompt: [n] tokens, 1 ≤ n < the context.
          turn: which of the conversation's answers this is; keys its randomness.
        """
        try:
            yield from self._answer([int(token) for token in prompt], turn)
        except GeneratorExit:
            raise
        except BaseException:  # an interrupt may come when a program has taken the cache and not given the new one back
            self._known, self._cache, self._slots = [], None, 0
            raise

    def _answer(self, prompt: list[int], turn: int) -> Iterator[int]:
        settings, policy = self.settings, self.policy
        self.stopped = False
        shared = next((i for i, (a, b) in enumerate(zip(prompt, self._known)) if a != b), min(len(prompt), len(self._known)))
        del self._known[min(shared, len(prompt) - 1) :]
        self.prefilled = len(prompt) - len(self._known)
        logits = self._read(prompt)
        key = sampling.row_keys(jax.random.key(settings.seed), 0, jnp.full(1, turn, jnp.int32), jnp.zeros(1, jnp.int32))
        room = min(settings.max_new_tokens, policy.config.context - len(prompt))
        state = _begin(policy.config, policy.mesh, settings.filters)(*_padded(prompt, policy.config.context))
        for count in range(0, room, STEPS):
            self._grow(len(self._known) + STEPS)
            program = _decode(policy.config, policy.mesh, settings.temperature, settings.top_k, settings.top_p, settings.filters)
            tokens, ended, logits, self._cache, state = program(
                policy.params, logits, self._cache, np.int32(len(self._known)), np.int32(count), key, state
            )
            for token, over in zip(np.asarray(tokens)[: room - count].tolist(), np.asarray(ended).tolist()):
                self._known.append(token)
                self.stopped = over or token in self.stop_ids
                yield token
                if self.stopped:
                    return

    def _read(self, prompt: list[int]) -> Array:
        """Prefills what is not in the cache; the logits after the last token, [1, V]."""
        logits = None
        while len(self._known) < len(prompt):
            begin = len(self._known)
            width = WIDTHS[0] if len(prompt) - begin <= 4 * WIDTHS[0] else WIDTHS[1]
            part = prompt[begin : begin + width]
            self._grow(begin + width)
            tokens = np.zeros((1, width), np.int32)
            tokens[0, : len(part)] = part
            logits, self._cache = _prefill(self.policy.config, self.policy.mesh)(
                self.policy.params, tokens, self._cache, np.int32(begin), np.int32(len(part) - 1)
            )
            self._known += part
        assert logits is not None
        return logits

    def _grow(self, needed: int) -> None:
        """Makes the cache at least `needed` slots long."""
        if needed <= self._slots:
            return
        slots, most = max(self._slots, FEWEST), self.policy.config.context + SLACK
        while slots < needed:
            slots *= 2
        slots = min(slots, most)
        fresh = _empty(self.policy.config, self.policy.mesh, slots)()
        if self._cache is not None:
            fresh = jax.tree.map(_moved, fresh, self._cache)
        self._cache, self._slots = fresh, slots


def _moved(fresh: Array, old: Array) -> Array:
    """`old` in the first slots of `fresh`."""
    return jax.lax.dynamic_update_slice(fresh, old, (0,) * fresh.ndim)


@functools.lru_cache
def _empty(config: ModelConfig, mesh: Mesh, slots: int) -> Any:
    """Placed as the programs give it back, so that they are not compiled again for it."""
    split = NamedSharding(mesh, PartitionSpec(None, sharding.RULES["kv_heads"]))
    heads = split if config.kv_heads % mesh.shape["tensor"] == 0 else sharding.replicated(mesh)
    where = jax.tree.map(lambda x: heads if x.ndim == 4 else NamedSharding(mesh, PartitionSpec(None, *heads.spec)),
                         jax.eval_shape(lambda: transformer.empty_cache(config, 1, slots)))
    return sharding.jit(lambda: transformer.empty_cache(config, 1, slots), mesh, out_shardings=where)


@functools.lru_cache
def _prefill(config: ModelConfig, mesh: Mesh) -> Any:
    def run(params: PyTree, tokens: Array, cache: Any, begin: Array, last: Array) -> tuple[Array, Any]:
        hidden, cache = _extend(config, params, tokens, cache, begin)
        return transformer.unembed(config, params, hidden[:, last]), cache

    return sharding.jit(run, mesh, donate=(2,))


def _padded(prompt: list[int], context: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments, [1, context], padded on the left."""
    tokens, segments = np.zeros((2, 1, context), np.int32)
    tokens[0, context - len(prompt) :], segments[0, context - len(prompt) :] = prompt, 1
    return tokens, segments


@functools.lru_cache
def _begin(config: ModelConfig, mesh: Mesh, filters: sampling.Filters) -> Any:
    """The filters' state behind a prompt."""

    def run(tokens: Array, segment_ids: Array) -> Any:
        ids = jnp.zeros(1, jnp.int32)
        prompts = Prompts(tokens=tokens, positions=tokens, segment_ids=segment_ids, prompt_ids=ids, sample_ids=ids, group_ids=ids)
        return filters.start(prompts, config.vocab_size)

    return sharding.jit(run, mesh)


@functools.lru_cache
def _decode(config: ModelConfig, mesh: Mesh, temperature: float, top_k: int, top_p: float, filters: sampling.Filters) -> Any:
    def run(params: PyTree, logits: Array, cache: Any, begin: Array, count: Array, keys: Array, state: Any) -> Any:
        def step(carry: Any, i: Array) -> Any:
            logits, cache, state = carry
            drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, count + i)
            picked, state = sampling.pick(logits, drawn, state, temperature=temperature, top_k=top_k, top_p=top_p, filters=filters)
            state = filters.observe(state, picked.token)
            hidden, cache = _extend(config, params, picked.token[:, None], cache, begin + i)
            carry = transformer.unembed(config, params, hidden[:, 0]), cache, state
            return carry, (picked.token[0], filters.ended(jnp.zeros(1, bool), state)[0])

        (logits, cache, state), (tokens, ended) = jax.lax.scan(step, (logits, cache, state), jnp.arange(STEPS))
        return tokens, ended, logits, cache, state

    return sharding.jit(run, mesh, donate=(2,))


def _extend(config: ModelConfig, params: PyTree, tokens: Array, cache: Any, begin: Array) -> tuple[Array, Any]:
    """Hidden states of tokens in the slots from `begin` on, each of which sees the slots up to its own."""
    slots = kv.length(cache)
    at = begin + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    mask = jnp.arange(slots)[None, None, :] <= at[:, :, None]
    return transformer.cached(config, params, tokens, at, mask, cache, begin)


class Chat:
    """Messages, and a policy that answers them.

    Args:
      policy: on its devices.
      tokenizer: the policy's.
      template: lays the conversation out.
      settings: how answers are drawn.

    Raises:
      UserError: the template does not fit the tokenizer.
    """

    def __init__(self, policy: Policy, tokenizer: Tokenizer, template: ChatTemplate, settings: Sampling) -> None:
        self.messages: list[Message] = []
        self.turns = 0  # answers so far; no two draw the same random numbers
        self.forgotten = 0  # messages that the last prompt left out, the oldest ones
        self.truncated = False  # whether the last answer ended without a stop token
        self.context = policy.config.context
        self.speaker = Speaker(policy, tokenizer.stop_ids, settings)
        self._tokenizer, self._settings = tokenizer, settings
        self._encoder = Encoder(tokenizer, template, max_length=self.context, prompt_length=None, overlong="error")

    def say(self, text: str) -> Iterator[str]:
        """Answers a message, piece by piece; both are kept in `messages`, an answer that the caller stops reading as far as it came.

        Args:
          text: the user's.

        Raises:
          UserError: the message alone fills the context, or the template refuses it.
        """
        messages = [*self.messages, Message(role="user", content=text)]
        prompt = self._prompt(messages)
        self.messages = messages
        stream, drawn, said = self._tokenizer.stream(), 0, ""
        self.truncated = True
        try:
            for token in self.speaker.answer(prompt, self.turns):
                drawn += 1
                self.truncated = not self.speaker.stopped
                if token in self.speaker.stop_ids:
                    break
                said += (piece := stream.push(token))
                if piece:
                    yield piece
            said += (piece := stream.finish())
            if piece:
                yield piece
        finally:
            self.turns += 1
            self.messages.append(Message(role="assistant", content=said))

    def undo(self) -> bool:
        """Takes back the last message of the user and what followed it; whether there was one."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            return False
        self.messages.pop()
        return True

    def system(self, text: str) -> None:
        """Begins the conversation anew, with a system message unless `text` is empty."""
        self.messages = [Message(role="system", content=text)] if text else []

    def _prompt(self, messages: list[Message]) -> np.ndarray:
        """The tokens of as many messages as leave room for an answer: the system message, and the last turns."""
        first = 1 if messages[0]["role"] == "system" else 0
        starts = [i for i in range(first, len(messages)) if messages[i]["role"] == "user"]
        room = min(self._settings.max_new_tokens, self.context // 2)
        for start in starts:
            shown: Messages = (*messages[:first], *messages[start:])
            prompt = self._encoder.prompt(shown)
            if len(prompt) + room <= self.context or (start == starts[-1] and len(prompt) < self.context):
                self.forgotten = start - first
                return prompt
        raise UserError(f"the message takes {len(prompt)} tokens with what must go with it, and the model reads {self.context}: shorten it")
