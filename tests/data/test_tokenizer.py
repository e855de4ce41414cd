import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner

from rlhf_jax.data.tokenizer import BOS, END, PAD, SPECIALS, Tokenizer, unused_characters
from rlhf_jax.errors import UserError
from tests.data.families import byte_level, sentencepiece

UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
MIXED = st.lists(st.one_of(st.sampled_from([*SPECIALS, "<|", "<", "|>", "<|e", " "]), UNICODE), max_size=6).map("".join)
CORPUS = ["the cat sat on the mat", "the dog sat on the log", "<|end|> is not special here"] * 20
BYTE = Tokenizer.byte_level()
BPE = Tokenizer.train_bpe(CORPUS, 300)


def test_byte_level_layout():
    assert (BYTE.vocab_size, BYTE.pad_id, BYTE.bos_id, BYTE.end_id) == (262, 0, 1, 5)
    ids, offsets = BYTE.encode("<|user|>hé<|end|>")
    assert ids[0] == 3 and ids[-1] == 5 and len(ids) == 5
    assert offsets.tolist() == [[0, 8], [8, 9], [9, 10], [9, 10], [10, 17]]


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
@given(text=MIXED)
@settings(max_examples=150, deadline=None)
def test_round_trip_of_any_text(tokenizer, text):
    ids, offsets = tokenizer.encode(text, control=False)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert not set(ids.tolist()) & set(tokenizer.specials.values())
    if tokenizer is BYTE:
        assert len(ids) == len(text.encode())
        assert [text[s:e] for s, e in offsets] == [c for c in text for _ in c.encode()]


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
@given(contents=st.lists(MIXED, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_a_message_cannot_inject_a_control_token(tokenizer, contents):
    hidden, stand = tokenizer.shield(contents)
    assert [len(h) for h in hidden] == [len(c) for c in contents]
    written = "".join(f"<|user|>{h}<|end|>" for h in hidden)
    text, literal = tokenizer.unshield(written, stand)
    assert text == "".join(f"<|user|>{c}<|end|>" for c in contents)
    ids, offsets = tokenizer.encode(text, literal=literal)
    assert [i for i in ids.tolist() if i in tokenizer.specials.values()] == [3, 5] * len(contents)
    # the bodies are what they are alone, so nothing else changed either
    ends = np.flatnonzero(ids == 5)
    starts = np.flatnonzero(ids == 3)
    for s, e, content in zip(starts, ends, contents):
        assert ids[s + 1 : e].tolist() == tokenizer.encode(content, control=False)[0].tolist()
    assert offsets[-1].tolist() == [len(text) - 7, len(text)]


@given(contents=st.lists(st.text("ab <|", max_size=12), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_split_encoding_equals_the_native_one_without_literals(contents):
    text = "<|bos|>" + "<|end|>".join(contents)
    for tokenizer in (BYTE, BPE):
        native, split = tokenizer.encode(text), tokenizer.encode(text, literal=[len(text)])
        np.testing.assert_array_equal(native[0], split[0])
        np.testing.assert_array_equal(native[1], split[1])


def test_no_token_forms_across_a_border():
    """A content that ends with the beginning of a control string, stripped or not, before a template that goes on with its rest."""
    for content, strip in (("x<|en", False), ("x<|en \n", True)):
        (hidden,), stand = BYTE.shield([content])
        text, literal = BYTE.unshield((hidden.strip() if strip else hidden) + "d|>", stand)
        assert BYTE.end_id not in BYTE.encode(text, literal=literal)[0]


def test_stand_ins_occur_nowhere_in_the_contents():
    taken = chr(0x10F000)
    (hidden,), stand = BYTE.shield([f"{taken}<|end|>"])
    assert taken not in stand.original
    assert BYTE.unshield(hidden, stand) == (f"{taken}<|end|>", [1])
    everything = "".join(map(chr, [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]))
    with pytest.raises(UserError, match="unused private-use character"):
        unused_characters([everything], 1)


def test_bpe_is_deterministic_and_shorter():
    again = Tokenizer.train_bpe(iter(CORPUS), 300)
    assert again.digest == BPE.digest != BYTE.digest
    assert 262 < BPE.vocab_size <= 300
    assert list(BPE.specials) == list(SPECIALS) and list(BPE.specials.values()) == list(range(6))
    ids = BPE.encode("the cat sat")[0]
    assert len(ids) < len("the cat sat") and ids.max() < BPE.vocab_size


@pytest.mark.parametrize("texts", [[], [""]])
def test_bpe_refuses_an_empty_corpus(texts):
    with pytest.raises(UserError, match=r"config\.tokenizer\.path expected text"):
        Tokenizer.train_bpe(texts, 300)


def test_bpe_refuses_a_small_vocabulary():
    with pytest.raises(UserError, match=r"config\.tokenizer\.vocab_size expected at least 262.*got 100"):
        Tokenizer.train_bpe(CORPUS, 100)


def test_save_and_load(tmp_path):
    path = tmp_path / "deep" / "tokenizer.json"
    BPE.save(path)
    for place in (path, path.parent):
        loaded = Tokenizer.load(place)
        assert loaded.digest == BPE.digest
        np.testing.assert_array_equal(loaded.encode("the <|end|>")[0], BPE.encode("the <|end|>")[0])
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    merged = Tokenizer.load(path, pad=END)
    assert merged.pad_id == merged.end_id and merged.digest != BPE.digest


def test_load_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"config\.tokenizer\.path expected a tokenizer.json, got '.*none'"):
        Tokenizer.load(tmp_path / "none")
    pathlib.Path(tmp_path, "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.tokenizer\.path expected a tokenizer.json, got '.*x.json' \("):
        Tokenizer.load(tmp_path / "x.json")
    BYTE.save(tmp_path / "t.json")
    with pytest.raises(UserError, match=r"config\.tokenizer\.end expected a special token of the tokenizer, got '<\|end'.*did you mean"):
        Tokenizer.load(tmp_path / "t.json", end="<|end")


def test_decode_skips_control_tokens_on_request():
    ids = BYTE.encode(f"{BOS}a{END}{PAD}")[0]
    assert (BYTE.decode(ids), BYTE.decode(ids, skip_special=False)) == ("a", f"{BOS}a{END}{PAD}")
    assert BYTE.decode([6 + 100, 300 % 262]) is not None and BYTE.decode([]) == ""


# --- tokenizers of other makers: lengths change on the way, and pieces of a text know where they stand ---

STYLES = ("prepend", "first", "never")
WIDE = {"<|x|>": {"lstrip": True, "rstrip": True}}
FOREIGN = {style: Tokenizer(sentencepiece(["<|x|>"], style, flags=WIDE), pad="</s>", bos="<s>", end="</s>") for style in STYLES}
FOREIGN["bytes"] = Tokenizer(byte_level(["<s>", "</s>", "<|x|>"], flags=WIDE), pad="</s>", bos="<s>", end="</s>")
FOREIGN["normalized"] = Tokenizer(
    byte_level(["<s>", "</s>", "<|x|>"], flags={"</s>": {"normalized": True}}), pad="</s>", bos="<s>", end="</s>"
)
BITS = ["</s>", "<s>", "</", "<", "s>", "<|x|>", " ", "  ", "\n", "the", " cat", "é", "☃", "x", "▁"]
TALK = st.lists(st.sampled_from(BITS), max_size=8).map("".join)


def without(name, *tokens):
    """The tokenizers that know fewer control tokens: what `encode` must equal where those are text."""
    specials = [token for token in ("<|x|>",) if token not in tokens]
    if name in STYLES:
        inner = sentencepiece(specials, name, flags=WIDE)
    else:
        inner = byte_level(["<s>", "</s>", "<|x|>"], flags=WIDE if name == "bytes" else {})
    layout = json.loads(inner.to_str())
    layout["added_tokens"] = [token for token in layout["added_tokens"] if token["content"] not in tokens]
    return Inner.from_str(json.dumps(layout))


BARE = {name: without(name, "</s>", "<s>", "<|x|>", "<unk>") for name in FOREIGN}
ONLY_BOS = {name: without(name, "</s>", "<|x|>") for name in FOREIGN}


@pytest.mark.parametrize("name", FOREIGN)
@given(text=TALK)
@settings(max_examples=150, deadline=None)
def test_plain_text_is_what_a_tokenizer_without_control_tokens_reads(name, text):
    ids, offsets = FOREIGN[name].encode(text, control=False)
    expected = BARE[name].encode(text, add_special_tokens=False)
    assert ids.tolist() == expected.ids and offsets.tolist() == [list(pair) for pair in expected.offsets]


@pytest.mark.parametrize("name", FOREIGN)
@given(contents=st.lists(TALK, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_hidden_control_strings_leave_the_other_pieces_alone(name, contents):
    """The template writes `<s>` alone; a tokenizer that knows no other control token shows what the rest must be."""
    tokenizer = FOREIGN[name]
    contents = [content.replace("<s>", "<sx>") for content in contents]
    hidden, stand = tokenizer.shield(contents)
    text, literal = tokenizer.unshield("".join(f"<s>{content} the" for content in hidden), stand)
    assert text == "".join(f"<s>{content} the" for content in contents)
    ids, offsets = tokenizer.encode(text, literal=literal)
    expected = ONLY_BOS[name].encode(text, add_special_tokens=False)
    assert ids.tolist() == expected.ids and offsets.tolist() == [list(pair) for pair in expected.offsets]


def test_sentencepiece_by_hand():
    """▁ before every piece ("prepend"), before the text alone ("first"), nowhere ("never"); the bytes of é are 0xC3 and 0xA9."""
    text = "the</s>the é"
    pieces = {
        "prepend": ["▁the", "</s>", "▁the", "▁", "<0xC3>", "<0xA9>"], "first": ["▁the", "</s>", "the", "▁", "<0xC3>", "<0xA9>"],
        "never": ["the", "</s>", "the", "▁", "<0xC3>", "<0xA9>"],
    }
    for style, expected in pieces.items():
        ids, offsets = FOREIGN[style].encode(text)
        assert [FOREIGN[style].token(i) for i in ids.tolist()] == expected
        assert offsets.tolist() == [[0, 3], [3, 7], [7, 10], [10, 11], [11, 12], [11, 12]]
        ids, _ = FOREIGN[style].encode(text, literal=[3])
        assert [FOREIGN[style].token(i) for i in ids.tolist()] == [expected[0], "<", "/", "s", ">", "the", "▁", "<0xC3>", "<0xA9>"]


def test_a_normalized_control_token_is_read_as_it_is_written():
    """Llama 1's files flag `</s>` as normalized: the library itself then looks for `▁</s>`, and reads four characters in a chat."""
    inner = sentencepiece([], "prepend", flags={"</s>": {"normalized": True}})
    assert inner.encode("the</s>", add_special_tokens=False).tokens == ["▁the", "<", "/", "s", ">"]
    made = Tokenizer(inner, pad="</s>", bos="<s>", end="</s>")
    assert made.encode("the</s>")[0].tolist() == [inner.token_to_id("▁the"), 2]


def test_white_space_that_a_token_swallows_is_not_its_own():
    ids, offsets = FOREIGN["first"].encode("the \n<|x|>  cat")
    assert [FOREIGN["first"].token(i) for i in ids.tolist()] == ["▁the", "<|x|>", "cat"]
    assert offsets.tolist() == [[0, 3], [5, 10], [12, 15]]


def test_a_tokenizer_may_have_no_beginning_and_another_end_of_document():
    made = Tokenizer(byte_level(["<s>", "</s>", "<|x|>"]), pad="</s>", bos="", end="<|x|>", eos="</s>", stops=[5, 280])
    assert (made.bos, made.bos_id, made.end_id, made.eos_id, made.stop_ids) == (None, None, 281, 280, (281, 280, 5))
    assert made.variables == {"eos_token": "</s>", "pad_token": "</s>"}
    assert made.control_tokens == {"pad": "</s>", "bos": None, "end": "<|x|>", "eos": "</s>", "stops": [5, 280]}
    assert made.replace(end="</s>").digest != made.digest == made.replace().digest
    assert BYTE.control_tokens == {"pad": PAD, "bos": BOS, "end": END} and BYTE.stop_ids == (5,)


# --- streaming ---


@pytest.mark.parametrize("name", ["byte", *FOREIGN])
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_of_a_stream_are_the_text(name, data, skip):
    """Any ids: bytes that are no text, control tokens, ids without a token."""
    tokenizer = BYTE if name == "byte" else FOREIGN[name]
    some = tokenizer.encode("the  cat é ☃日本 </s>", control=False)[0].tolist()
    ids = data.draw(st.lists(st.one_of(st.sampled_from(some), st.integers(0, tokenizer.vocab_size + 3)), max_size=20))
    stream = tokenizer.stream(skip_special=skip)
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip)


def test_a_stream_speaks_as_soon_as_it_can():
    stream = BYTE.stream()
    assert [stream.push(i) for i in BYTE.encode("hé☃<|end|>")[0]] == ["h", "", "é", "", "", "☃", ""] and stream.finish() == ""
    llama = FOREIGN["first"]
    stream = llama.stream()
    pieces = [stream.push(i) for i in llama.encode("the cat é the")[0]]
    assert pieces == ["the", " cat", " ", "", "", "é the"] and stream.finish() == ""
    stream = llama.stream()
    assert [stream.push(i) for i in llama.encode("the☃")[0][:-1]] == ["the", "", ""] and stream.finish() == "\ufffd\ufffd"
    assert stream.finish() == ""
