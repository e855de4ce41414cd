"""`config.sampling.filters`: what is done to the logits before a token is drawn, composed from a list of dicts in their order.

    c.sampling.filters = (dict(name="repetition_penalty", penalty=1.1), dict(name="bad_words", words=(" foo", (17, 4))), dict(name="min_p", p=0.05))

Edits of what the network says come first, cuts to its likeliest tokens last; between the two stand the section's own `temperature`, `top_k` and
`top_p`, in this order. Temperature is no filter of the list, since it divides the trainer's logits too. A filter is a pure function
`(logits, state) -> (logits, state)`; the state holds what filters read of the row so far, no more than the list needs, and moves on with each
drawn token. Stop strings are followed in the same state. Both they and bad words that are texts are looked for in what is generated alone; bad
words that are rows of ids may begin in the prompt, whose last tokens they see. The maths is in ops/logit_filters.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.spelling import token_bytes
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.ops import logit_filters
from rlhf_jax.sampling import matcher
from rlhf_jax.types import Array

KEY, STOPS = "config.sampling.filters", "config.sampling.stop_strings"
PARAMETERS = {  # each filter's one parameter
    "repetition_penalty": "penalty", "presence_penalty": "penalty", "frequency_penalty": "penalty", "logit_bias": "bias", "bad_words": "words",
    "min_new_tokens": "tokens", "allowed": "ids", "top_k": "k", "top_p": "p", "min_p": "p",
}
CUTS = ("top_k", "top_p", "min_p")
FINITE = float(np.finfo(np.float32).max)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["count", "seen", "counts", "recent", "words", "stops"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class State:
    """What filters read of each row; None where no filter reads it."""

    count: Array | None = None  # [B] int32, tokens generated
    seen: Array | None = None  # [B, V] bool, tokens of the prompt and of what was generated
    counts: Array | None = None  # [B, V] int32, how often each token was generated
    recent: Array | None = None  # [B, L] int32, the last tokens, prompt included; −1 before the first
    words: Array | None = None  # [B] int32, the matcher's state for bad words
    stops: Array | None = None  # [B] int32, the matcher's state for stop strings


Filter = Callable[[Array, State], tuple[Array, State]]


@dataclasses.dataclass(frozen=True, eq=False)
class Filters:
    """The composed list. `NONE` does nothing and costs nothing."""

    edits: tuple[Filter, ...] = ()
    cuts: tuple[Filter, ...] = ()
    needs: frozenset[str] = frozenset()  # fields of the state
    recent: int = 0  # L
    words: matcher.Matcher | None = None
    stops: matcher.Matcher | None = None

    def start(self, prompts: Any, vocab_size: int) -> State:
        """The state before the first token.

        Args:
          prompts: has `tokens` and `segment_ids`, [B, P], padded on the left.
          vocab_size: V.
        """
        chex.assert_rank(prompts.tokens, 2)
        batch, real = prompts.tokens.shape[0], prompts.segment_ids != 0
        zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
        last = jnp.pad(jnp.where(real, prompts.tokens, -1), ((0, 0), (self.recent, 0)), constant_values=-1)
        made: dict[str, Callable[[], Array]] = {
            "count": lambda: zeros(batch), "counts": lambda: zeros((batch, vocab_size)), "words": lambda: zeros(batch), "stops": lambda: zeros(batch),
            "seen": lambda: jnp.zeros((batch, vocab_size), bool).at[jnp.arange(batch)[:, None], prompts.tokens].max(real),
            "recent": lambda: last[:, last.shape[1] - self.recent :],
        }
        return State(**{name: made[name]() for name in self.needs})

    def edit(self, logits: Array, state: State) -> tuple[Array, State]:
        """The edits, in their order. [B, V] float32, before the temperature."""
        chex.assert_rank(logits, 2)
        return _run(self.edits, logits, state)

    def cut(self, logits: Array, state: State) -> tuple[Array, State]:
        """The cuts, in their order. [B, V] float32, after the temperature."""
        chex.assert_rank(logits, 2)
        return _run(self.cuts, logits, state)

    def observe(self, state: State, token: Array) -> State:
        """The state after one more token per row.

        Args:
          state: before it.
          token: [B] int32.
        """
        chex.assert_rank(token, 1)
        rows, changes = jnp.arange(token.shape[0]), {}
        if state.count is not None:
            changes["count"] = state.count + 1
        if state.seen is not None:
            changes["seen"] = state.seen.at[rows, token].set(True)
        if state.counts is not None:
            changes["counts"] = state.counts.at[rows, token].add(1)
        if state.recent is not None:
            changes["recent"] = jnp.concatenate([state.recent[:, 1:], token[:, None]], axis=1)
        if state.words is not None and self.words is not None:
            words = self.words.step(state.words, token)
            changes["words"] = jnp.where(words == self.words.found, 0, words)  # a ban that had to be lifted does not end the watch
        if state.stops is not None and self.stops is not None:
            changes["stops"] = self.stops.step(state.stops, token)
        return dataclasses.replace(state, **changes)

    def ended(self, done: Array, state: State) -> Array:
        """[B] bool, the rows that are done already or have a stop string complete.

        Args:
          done: [B] bool.
          state: with the last token observed.
        """
        chex.assert_rank(done, 1)
        return done if self.stops is None else done | (state.stops == self.stops.found)


NONE = Filters()


def check(entries: Any, stop_strings: Any, *, max_new_tokens: int = 0) -> None:
    """Refuses what `build` could not compose, as far as it can be seen without a tokenizer.

    Args:
      entries: config.sampling.filters.
      stop_strings: config.sampling.stop_strings.
      max_new_tokens: config.sampling.max_new_tokens, which min_new_tokens may not exceed; 0 = not known.

    Raises:
      UserError: the first mistake, with its place, value and remedy.
    """
    if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence):
        raise UserError(f"{KEY} = {entries!r}: must be a tuple of dicts, e.g. (dict(name='min_p', p=0.05),)")
    cut = ""
    for number, entry in enumerate(entries):
        where = f"{KEY}[{number}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise UserError(f"{where} = {entry!r}: must be a dict with a name, e.g. dict(name='min_p', p=0.05)")
        name = entry["name"]
        if name == "temperature":
            raise UserError(f"{where}: temperature divides the trainer's logits too; set config.sampling.temperature")
        if name not in PARAMETERS:
            raise UserError(f"{where}.name = {name!r} is not a filter{nearest(name, PARAMETERS)}")
        for key in (*(key for key in entry if key not in ("name", PARAMETERS[name])), *({PARAMETERS[name]} - entry.keys())):
            raise UserError(f"{where}: {name} takes {PARAMETERS[name]} and nothing else, got {', '.join(entry) or 'nothing'} (look at {key!r})")
        if name not in CUTS and cut:
            raise UserError(f"{where}: {name} edits the logits that {cut} before it has cut already: list it first")
        cut = name if name in CUTS else cut
        _check_value(where, name, entry[PARAMETERS[name]])
        if name == "min_new_tokens" and 0 < max_new_tokens < entry["tokens"]:
            raise UserError(f"{where}.tokens = {entry['tokens']} exceeds config.sampling.max_new_tokens = {max_new_tokens}: lower it")
    if isinstance(stop_strings, str) or not isinstance(stop_strings, Sequence) or not all(isinstance(s, str) and s for s in stop_strings):
        raise UserError(f"{STOPS} = {stop_strings!r}: must be a tuple of texts, none empty, e.g. ('\\n\\n',)")


def build(entries: Sequence[Mapping[str, Any]], stop_strings: Sequence[str], *, tokenizer: Tokenizer, vocab_size: int, max_new_tokens: int = 0
          ) -> Filters:
    """The filters of a config, for a tokenizer.

    Args:
      entries: config.sampling.filters.
      stop_strings: config.sampling.stop_strings; the token that completes one of them is a row's last.
      tokenizer: the policy's.
      vocab_size: V of the policy's logits.
      max_new_tokens: as in `check`.

    Raises:
      UserError: an entry that cannot be, names a token that there is not, or bans every token.
    """
    check(entries, stop_strings, max_new_tokens=max_new_tokens)
    words = [word for entry in entries if entry["name"] == "bad_words" for word in entry["words"]]
    texts, rows = [word for word in words if isinstance(word, str)], [tuple(word) for word in words if not isinstance(word, str)]
    for text in (*texts, *stop_strings):
        if text in tokenizer.specials:
            raise UserError(f"{STOPS if text in stop_strings else KEY} has {text!r}, a control token, which is no part of a text: name its id "
                            f"{tokenizer.specials[text]} in bad_words to ban it; the tokenizer's own stop tokens end a row anyway")
    spelling = token_bytes(tokenizer) if texts or stop_strings else []
    find = functools.partial(matcher.build, spelling=spelling, vocab_size=vocab_size)
    context = _Context(
        vocab_size=vocab_size, stop_ids=tokenizer.stop_ids, rows=rows, words=find(texts, key=KEY) if texts else None,
        stops=find(stop_strings, key=STOPS) if stop_strings else None,
    )
    _check_left(entries, context)
    parts = [(entry["name"], *_FACTORIES[entry["name"]](entry[PARAMETERS[entry["name"]]], context)) for entry in entries]
    live = [(name, run, needs) for name, run, needs in parts if run is not None]
    needs = frozenset().union(*(needs for _, _, needs in live), {"stops"} if stop_strings else ())
    return Filters(
        edits=tuple(run for name, run, _ in live if name not in CUTS), cuts=tuple(run for name, run, _ in live if name in CUTS), needs=needs,
        recent=max((len(row) - 1 for row in rows), default=0), words=context.words, stops=context.stops,
    )


@dataclasses.dataclass(frozen=True)
class _Context:
    vocab_size: int
    stop_ids: tuple[int, ...]
    rows: list[tuple[int, ...]]  # bad words as ids
    words: matcher.Matcher | None
    stops: matcher.Matcher | None


_Part = tuple[Filter | None, set[str]]  # None: it does nothing


def _run(filters: tuple[Filter, ...], logits: Array, state: State) -> tuple[Array, State]:
    for one in filters:
        logits, state = one(logits, state)
    return logits, state


def _held(field: Array | None) -> Array:
    """A field of the state that the filter has said it needs."""
    if field is None:
        raise AssertionError("the state was not started by the filters that read it")
    return field


def _mask(ids: Sequence[int], context: _Context) -> Array:
    mask = np.zeros((1, context.vocab_size), bool)
    mask[0, list(ids)] = True
    return jnp.asarray(mask)


def _repetition_penalty(penalty: float, _: _Context) -> _Part:
    run: Filter = lambda z, s: (logit_filters.repetition_penalty(z, _held(s.seen), penalty=penalty), s)  # noqa: E731
    return (None, set()) if penalty == 1 else (run, {"seen"})


def _presence_penalty(penalty: float, _: _Context) -> _Part:
    run: Filter = lambda z, s: (logit_filters.count_penalty(z, _held(s.counts), presence=penalty, frequency=0.0), s)  # noqa: E731
    return (None, set()) if penalty == 0 else (run, {"counts"})


def _frequency_penalty(penalty: float, _: _Context) -> _Part:
    run: Filter = lambda z, s: (logit_filters.count_penalty(z, _held(s.counts), presence=0.0, frequency=penalty), s)  # noqa: E731
    return (None, set()) if penalty == 0 else (run, {"counts"})


def _logit_bias(bias: Mapping[Any, float], context: _Context) -> _Part:
    added = np.zeros(context.vocab_size, np.float32)
    for token, value in bias.items():
        added[int(token)] = value
    return (lambda z, s: (logit_filters.add_bias(z, jnp.asarray(added)), s)) if added.any() else None, set()


def _bad_words(words: Sequence[Any], context: _Context) -> _Part:
    """Bans the token that would complete a bad word: of a row of ids behind the same ids, of a text wherever the tokens' borders fall.

    A row of ids may begin in the prompt; a text is looked for in what is generated alone, since a prompt ends in the template's own marks.
    """
    rows = [tuple(word) for word in words if not isinstance(word, str)]
    texts = any(isinstance(word, str) for word in words)
    single, several = [row[0] for row in rows if len(row) == 1], [row for row in rows if len(row) > 1]
    length = max((len(row) - 1 for row in context.rows), default=0)
    begins = np.array([[-2] * (length - len(row) + 1) + list(row[:-1]) for row in several], np.int32).reshape(len(several), length)
    ends = np.array([row[-1] for row in several], np.int32)

    def run(logits: Array, state: State) -> tuple[Array, State]:
        banned = jnp.broadcast_to(_mask(single, context), logits.shape)
        if several:
            hit = ((_held(state.recent)[:, None, :] == begins[None]) | (begins == -2)[None]).all(-1)  # [B, words]
            banned = banned.at[:, ends].max(hit)
        if texts and context.words is not None:
            banned |= context.words.completing(_held(state.words))
        return logit_filters.ban(logits, banned), state

    return run if words else None, ({"recent"} if several else set()) | ({"words"} if texts else set())


def _min_new_tokens(tokens: int, context: _Context) -> _Part:
    """Bans what would end the row, stop tokens and what completes a stop string, as long as fewer than `tokens` are there."""

    def run(logits: Array, state: State) -> tuple[Array, State]:
        banned = jnp.broadcast_to(_mask(context.stop_ids, context), logits.shape)
        if context.stops is not None:
            banned |= context.stops.completing(_held(state.stops))
        return logit_filters.ban(logits, banned & (_held(state.count) < tokens)[:, None]), state

    return (None, set()) if tokens == 0 else (run, {"count"})


def _allowed(ids: Sequence[int], context: _Context) -> _Part:
    banned = ~_mask(ids, context)
    return lambda z, s: (logit_filters.ban(z, banned), s), set()


def _cut(name: str) -> Callable[[Any, _Context], _Part]:
    nothing = {"top_k": 0, "top_p": 1, "min_p": 0}[name]
    run = getattr(logit_filters, name)
    return lambda value, _: (None if value == nothing else lambda z, s: (run(z, **{PARAMETERS[name]: value}), s), set())


_FACTORIES: dict[str, Callable[[Any, _Context], _Part]] = {
    "repetition_penalty": _repetition_penalty, "presence_penalty": _presence_penalty, "frequency_penalty": _frequency_penalty,
    "logit_bias": _logit_bias, "bad_words": _bad_words, "min_new_tokens": _min_new_tokens, "allowed": _allowed, **{name: _cut(name) for name in CUTS},
}
def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _number(x: Any) -> bool:
    """Whether float32, in which logits are edited, holds it."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= FINITE  # false of NaN


def _list(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str)


def _id(x: Any) -> bool:
    return _whole(x) or (isinstance(x, str) and x.isdecimal())  # JSON has no whole numbers as keys


_COUNT = (lambda x: _whole(x) and x >= 0, "a whole number ≥ 0")
_SHARE = (lambda x: _number(x) and 0 <= x <= 1, "a number from 0 (off) to 1")
_PENALTY = (_number, "a finite number; 0 switches it off")
_LEGAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "repetition_penalty": (lambda x: _number(x) and x > 0, "a finite number > 0; 1 switches it off"), "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY, "min_new_tokens": _COUNT, "top_k": _COUNT, "min_p": _SHARE,
    "top_p": (lambda x: _number(x) and 0 < x <= 1, "a number above 0 and at most 1 (off)"),
    "logit_bias": (lambda x: isinstance(x, Mapping) and all(_id(k) and _number(v) for k, v in x.items()),
                   "a dict of finite numbers by token id, e.g. {17: -2.0}; a token is banned by bad_words"),
    "bad_words": (lambda x: _list(x) and all((isinstance(w, str) and w) or (_list(w) and len(w) and all(map(_whole, w))) for w in x),
                  "a tuple of texts and of tuples of token ids, none empty"),
    "allowed": (lambda x: _list(x) and len(x) > 0 and all(map(_whole, x)), "a tuple of token ids, at least one"),
}


def _check_value(where: str, name: str, value: Any) -> None:
    legal, wanted = _LEGAL[name]
    if not legal(value):
        raise UserError(f"{where}.{PARAMETERS[name]} = {value!r}: must be {wanted}")


def _check_left(entries: Sequence[Mapping[str, Any]], context: _Context) -> None:
    """Refuses ids outside the vocabulary, and entries that together leave no token to draw."""
    left = set(range(context.vocab_size))
    for number, entry in enumerate(entries):
        named: list[int] = []
        if entry["name"] == "allowed":
            named = list(entry["ids"])
            left &= set(named)
        elif entry["name"] == "logit_bias":
            named = [int(token) for token in entry["bias"]]
        elif entry["name"] == "bad_words":
            named = [token for word in entry["words"] if not isinstance(word, str) for token in word]
        if outside := [token for token in named if not 0 <= token < context.vocab_size]:
            raise UserError(f"{KEY}[{number}]: {entry['name']} names token {outside[0]}, and the vocabulary has {context.vocab_size}: take it out")
        if entry["name"] == "bad_words":
            left -= {word[0] for word in entry["words"] if not isinstance(word, str) and len(word) == 1}
        if not left:
            raise UserError(f"{KEY}[{number}]: {entry['name']} leaves no token to draw with the filters before it: allow more, or ban fewer")
    for number, entry in enumerate(entries):
        if entry["name"] == "min_new_tokens" and entry["tokens"] and left <= set(context.stop_ids):
            raise UserError(f"{KEY}[{number}]: min_new_tokens bans the stop tokens, and the other filters leave nothing else: allow more")
