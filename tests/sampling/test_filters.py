"""The filters of a config: sampled frequencies against exact probabilities, one by one and composed; what is refused at start-up."""

from __future__ import annotations

import functools
import itertools
import tracemalloc
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sampling
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.ops import categorical
from rlhf_jax.sampling import filters, matcher
from tests.models import tiny
from tests.ops.test_categorical import critical, softmax, statistic
from tests.sampling.test_sampler import prompts

VOCABULARY, STOP = 9, 3
LOGITS = np.array([2.0, 1.5, 1.5, 1.0, -1.0, 0.3, -0.5, 0.8, 1.2], np.float32)
PROMPT, SAID = (5, 7, 1, 7), (1, 4, 1)  # what stood before, and what was generated so far
TOKENIZER: Any = types.SimpleNamespace(specials={}, stop_ids=(STOP,))


def build(*entries: dict[str, Any], stops: tuple[str, ...] = (), tokenizer: Any = TOKENIZER, vocab_size: int = VOCABULARY) -> sampling.Filters:
    return filters.build(entries, stops, tokenizer=tokenizer, vocab_size=vocab_size)


def entry(name: str, value: Any) -> dict[str, Any]:
    return {"name": name, filters.PARAMETERS[name]: value}


def state_of(composed: sampling.Filters, rows: int) -> filters.State:
    """After PROMPT and SAID, in every row."""
    state = composed.start(prompts([PROMPT] * rows, 6), VOCABULARY)
    for token in SAID:
        state = composed.observe(state, jnp.full(rows, token, jnp.int32))
    return state


def exact(entries: tuple[dict[str, Any], ...], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """The distribution after PROMPT and SAID, float64 loops: edits, temperature, top-k, top-p, cuts."""
    z, row = LOGITS.astype(np.float64).copy(), PROMPT + SAID
    for one in entries:
        name, value = one["name"], next((v for k, v in one.items() if k != "name"))
        for v in range(VOCABULARY):
            if name == "repetition_penalty" and v in row:
                z[v] = z[v] / value if z[v] > 0 else z[v] * value
            elif name == "presence_penalty":
                z[v] -= value * (v in SAID)
            elif name == "frequency_penalty":
                z[v] -= value * SAID.count(v)
            elif name == "logit_bias":
                z[v] += dict((int(k), b) for k, b in value.items()).get(v, 0)
            banned = {
                "bad_words": lambda: any(word[-1] == v and row[len(row) - len(word) + 1 :] == tuple(word[:-1]) for word in value),  # noqa: B023
                "min_new_tokens": lambda: v == STOP and len(SAID) < value, "allowed": lambda: v not in value,  # noqa: B023
            }
            if name in banned and banned[name]():
                z[v] = -np.inf
    z = z / temperature
    for name, value in [("top_k", top_k or VOCABULARY), ("top_p", top_p), *((e["name"], e[filters.PARAMETERS[e["name"]]]) for e in entries)]:
        p, ranked = softmax(z), sorted(range(VOCABULARY), key=lambda v: (-z[v], v))
        if name == "top_k":
            z[[v for v in ranked[value:]]] = -np.inf
        elif name == "top_p":
            z[[v for at, v in enumerate(ranked) if at and p[ranked[:at]].sum() >= value]] = -np.inf
        elif name == "min_p":
            z[p < value * p.max()] = -np.inf
    return softmax(z)


CASES: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any]]] = {
    "repetition_penalty": ((entry("repetition_penalty", 1.8),), {}),
    "presence_penalty": ((entry("presence_penalty", 1.3),), {}),
    "frequency_penalty": ((entry("frequency_penalty", 0.9),), {}),
    "logit_bias": ((entry("logit_bias", {"8": 1.5, 0: -2.0}),), {}),
    "bad words": ((entry("bad_words", ((0,), (4, 1, 8), (1, 2), (7, 5), (9 - 1, 1, 4, 1, 6), (7, 1, 4, 1, 5))),), {}),
    "min_new_tokens": ((entry("min_new_tokens", 4),), {}),
    "enough tokens": ((entry("min_new_tokens", 3),), {}),
    "allowed": ((entry("allowed", (1, 3, 6, 8)),), {}),
    "min_p": ((entry("min_p", 0.3),), {}),
    "top_k and top_p of the list": ((entry("top_p", 0.8), entry("top_k", 3)), {}),
    "all, with temperature": (
        (entry("repetition_penalty", 1.3), entry("frequency_penalty", 0.4), entry("logit_bias", {5: 1.0}), entry("bad_words", ((2,),)),
         entry("min_new_tokens", 9), entry("min_p", 0.1)), {"temperature": 1.7, "top_k": 6, "top_p": 0.95}),
}


@pytest.mark.parametrize("smallest", [1024, 1], ids=["gumbel", "inversion"])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_the_filtered_probabilities(name: str, smallest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """χ² of 30 000 draws at a level of 1e-4, by either method; both log-probs are those of the two distributions."""
    monkeypatch.setattr(categorical, "LARGE", smallest)
    assert categorical.method(VOCABULARY, "cpu") == ("gumbel" if smallest > 1 else "inversion")
    entries, settings = CASES[name]
    composed, draws = build(*entries), 30_000
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    wanted, plain = exact(entries, **how), softmax(LOGITS / how["temperature"])
    run = tiny.jit(lambda keys, state: sampling.pick(jnp.broadcast_to(LOGITS, (draws, VOCABULARY)), keys, state, filters=composed, **how)[0])
    picked = jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(4), draws), state_of(composed, draws)))
    found, freedom = statistic(np.bincount(picked.token, minlength=VOCABULARY), wanted)
    assert found < critical(freedom), (found, wanted)
    np.testing.assert_allclose(picked.logp, np.log(wanted[picked.token]), atol=2e-5)
    read = picked.logp if picked.plain is None else picked.plain
    np.testing.assert_allclose(read, np.log(plain[picked.token]), atol=2e-5)
    assert (np.abs(wanted - plain).max() > 0.01) == (name != "enough tokens")


def test_each_case_names_its_filter() -> None:
    assert {one["name"] for entries, _ in CASES.values() for one in entries} == filters.PARAMETERS.keys()


@pytest.mark.parametrize("value", [
    ("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0.0), ("logit_bias", {}), ("logit_bias", {2: 0}), ("bad_words", ()),
    ("min_new_tokens", 0), ("top_k", 0), ("top_p", 1), ("min_p", 0),
])
def test_a_filter_that_does_nothing_costs_nothing(value: tuple[str, Any]) -> None:
    composed = build(entry(*value))
    assert not composed.edits and not composed.cuts and not jax.tree.leaves(state_of(composed, 2))


def test_greedy_takes_the_likeliest_of_the_edited() -> None:
    composed = build(entry("bad_words", ((0,),)), entry("repetition_penalty", 1.5))
    logits, keys = jnp.broadcast_to(LOGITS, (2, VOCABULARY)), jax.random.split(jax.random.key(0), 2)
    picked, _ = sampling.pick(logits, keys, state_of(composed, 2), temperature=0.0, top_k=0, top_p=1.0, filters=composed)
    assert picked.token.tolist() == [2, 2] and not np.asarray(picked.logp).any() and picked.plain is not None  # 1 was said already
    np.testing.assert_allclose(picked.plain, np.log(softmax(LOGITS)[2]), atol=1e-6)


# --- texts ---

BPE = Tokenizer.train_bpe(["ab abab abba baab aabb bab\n"] * 8, 274)


@functools.cache
def spelled() -> tuple[bytes, ...]:
    return tuple(filters.token_bytes(BPE))


@pytest.mark.parametrize("needles", [("bab",), ("\nab", "abba", "bb"), ("aab", "ab", "b\n"), ("日本",)])
def test_a_text_is_found_where_the_token_completes_it(needles: tuple[str, ...]) -> None:
    """Random rows of tokens of one to four bytes, against a search in the joined bytes; and the tokens that would complete it, one by one."""
    found = matcher.build(needles, spelled() if needles != ("日本",) else tuple(filters.token_bytes(Tokenizer.byte_level())), 300, "key")
    pieces = [*spelled(), *[b""] * 100]
    sayable = [at for at, piece in enumerate(pieces) if piece and set(piece) <= set(b"ab\n")]
    if needles == ("日本",):
        pieces = [*filters.token_bytes(Tokenizer.byte_level()), *[b""] * 100]
        sayable = [at for at, piece in enumerate(pieces) if piece and piece[0] in "日本".encode()]
    assert needles == ("日本",) or max(len(pieces[at]) for at in sayable) > 2
    rows = np.random.default_rng(1).choice(sayable, (40, 25))
    if needles == ("日本",):
        word = [pieces.index(bytes([byte])) for byte in "日本".encode()]
        rows[::2, 7:13] = word
    state, step, hits = jnp.zeros(40, jnp.int32), jax.jit(found.step), np.zeros(40, bool)
    texts = [b""] * 40
    for at in range(25):
        completing = np.asarray(found.completing(state)) if at % 8 == 3 else None
        for b in range(40) if completing is not None else ():
            expected = {v for v, piece in enumerate(pieces[:300]) if not hits[b] and any(n.encode() in texts[b] + piece for n in needles)}
            assert set(np.flatnonzero(completing[b])) == expected
        state = step(state, jnp.asarray(rows[:, at], jnp.int32))
        texts = [text + pieces[token] for text, token in zip(texts, rows[:, at])]
        hits = np.array([any(needle.encode() in text for needle in needles) for text in texts])
        np.testing.assert_array_equal(np.asarray(state) == found.found, hits)
    assert hits.any()


def test_a_bad_text_is_never_written_and_a_bad_row_of_ids_neither() -> None:
    """Drawn from a model, of three letters alone, with and without; a row of ids counts the prompt's last token."""
    letters = tuple(at for at, piece in enumerate(spelled()) if piece and set(piece) <= set(b"ab\n"))
    row = (letters[0], letters[2])
    config = tiny.config(vocab_size=BPE.vocab_size, layers=1)
    nets, batch = tiny.nets(config), prompts([(20, 21, letters[0])] * 24, 4)
    how = dict(iteration=0, max_new_tokens=20, temperature=2.0, top_k=0, top_p=1.0, stop_ids=(), pad_id=0)
    written = {}
    for name, words in {"free": (), "banned": ("aba", "bb", row)}.items():
        composed = build(entry("allowed", letters), entry("bad_words", words), tokenizer=BPE, vocab_size=BPE.vocab_size)
        run = tiny.jit(lambda n, p, c=composed: sampling.generate(n, p, jax.random.key(1), filters=c, **how).seqs.tokens)
        written[name] = np.asarray(run(nets, batch))
    for name, tokens in written.items():
        texts = [b"".join(spelled()[t] for t in line[4:]) for line in tokens]
        pairs = [row in itertools.pairwise(line[3:]) for line in tokens.tolist()]
        bad = [b"aba" in text or b"bb" in text or pair for text, pair in zip(texts, pairs)]
        assert np.mean(bad) > 0.9 if name == "free" else not any(bad)
        assert set(tokens[:, 4:].ravel()) <= set(letters)


def test_a_bad_text_that_could_not_be_avoided_is_banned_again_afterwards() -> None:
    """After "a" neither letter may come: the ban is lifted for one token, and holds again after the next "a"."""
    vocabulary = matcher.build(("aa", "ab"), [b"a", b"b"], 2, "key")
    composed = sampling.Filters(words=vocabulary, needs=frozenset({"words"}))
    state, banned = composed.start(prompts([(0,)], 1), 2), []
    for token in (0, 0, 0, 1, 0):
        banned.append(np.asarray(vocabulary.completing(state.words))[0].tolist())
        state = composed.observe(state, jnp.asarray([token], jnp.int32))
    assert banned == [[False, False], [True, True], [False, False], [True, True], [False, False]]


# --- refused at start-up ---

BAD = {
    "no list": ("min_p", "must be a tuple of dicts"),
    "no name": ((dict(p=0.1),), "must be a dict with a name"),
    "a typo": ((dict(name="min_q", p=0.1),), r"filters\[0\].name = 'min_q' is not a filter \(did you mean 'min_p'\?\)"),
    "temperature": ((dict(name="temperature", t=2.0),), "set config.sampling.temperature"),
    "another key": ((dict(name="min_p", k=0.1),), r"filters\[0\]: min_p takes p and nothing else"),
    "out of range": ((dict(name="min_p", p=1.5),), r"filters\[0\].p = 1.5: must be a number from 0"),
    "a negative penalty": ((dict(name="repetition_penalty", penalty=-1),), "must be a finite number > 0"),
    "not finite": ((dict(name="logit_bias", bias={1: float("-inf")}),), "finite numbers by token id"),
    "an empty word": ((dict(name="bad_words", words=("",)),), "none empty"),
    "one text": ((dict(name="bad_words", words="foo"),), "a tuple of texts"),
    "order": ((dict(name="min_p", p=0.1), dict(name="allowed", ids=(1,))), r"filters\[1\]: allowed edits the logits that min_p"),
    "outside": ((dict(name="allowed", ids=(1, 9)),), r"filters\[0\]: allowed names token 9, and the vocabulary has 9"),
    "nothing left": ((dict(name="allowed", ids=(1,)), dict(name="bad_words", words=((1,),))), r"filters\[1\]: bad_words leaves no token"),
    "only stops, listed the other way round": ((dict(name="min_new_tokens", tokens=2), dict(name="allowed", ids=(3,))),
                                               r"filters\[0\]: min_new_tokens bans the stop tokens"),
    "more than float32": ((dict(name="logit_bias", bias={1: 1e39}),), "finite numbers by token id"),
    "far more": ((dict(name="presence_penalty", penalty=10**400),), "must be a finite number"),
    "only stops": ((dict(name="allowed", ids=(3,)), dict(name="min_new_tokens", tokens=2)), r"filters\[1\]: min_new_tokens bans the stop tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_sentence_with_its_place(name: str) -> None:
    entries, message = BAD[name]
    with pytest.raises(UserError, match=r"config\.sampling\.filters") as error:
        filters.build(entries, (), tokenizer=TOKENIZER, vocab_size=VOCABULARY)
    error.match(message)


def test_more_tokens_at_least_than_at_most_are_refused() -> None:
    entries = (dict(name="min_new_tokens", tokens=5),)
    with pytest.raises(UserError, match=r"filters\[0\]\.tokens = 5 exceeds config\.sampling\.max_new_tokens = 4"):
        filters.check(entries, (), max_new_tokens=4)
    filters.check(entries, (), max_new_tokens=5)


@pytest.mark.parametrize(("stops", "message"), [("\n", "must be a tuple of texts"), (("",), "none empty"), (("<|end|>",), "a control token")])
def test_stop_strings_that_cannot_be_are_refused(stops: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"config\.sampling\.stop_strings") as error:
        filters.build((), stops, tokenizer=BPE, vocab_size=300)
    error.match(message)


def test_tokens_that_a_text_cannot_tell_apart_share_their_columns_from_the_start() -> None:
    """The automaton run over every byte of every token, from every state; and what building the table holds at once, against states × tokens."""
    rng = np.random.default_rng(0)
    alphabet = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)
    pieces = [bytes(alphabet[: 3 if n % 3 else None][rng.integers(0, 3 if n % 3 else 27, rng.integers(1, 8))]) for n in range(6000)]
    texts = ("abcab", "bb c", "ca" * 100, "z")
    tracemalloc.start()
    found = matcher.build(texts, pieces, 6100, "key")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.75 * 4 * 6100 * len(found.table) and found.table.shape[1] < 700
    delta = matcher._automaton([text.encode() for text in texts])
    for token in range(6100):
        state = np.arange(len(delta))
        for byte in pieces[token] if token < 6000 else b"":
            state = delta[state, byte]
        np.testing.assert_array_equal(found.table[:, found.columns[token]], state)


def test_texts_whose_table_would_be_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "CELLS", 20)
    with pytest.raises(UserError, match=r"config\.sampling\.filters has 1 texts of 6 bytes.*name fewer"):
        matcher.build(("abbaab",), spelled(), 300, "config.sampling.filters")


def test_a_text_that_no_token_writes_is_refused() -> None:
    with pytest.raises(UserError, match="never writes"):
        matcher.build(("x",), [b"a", b"b"], 2, "config.sampling.stop_strings")
