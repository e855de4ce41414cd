"""Rows of mixed forms: what an imported tokenizer adds, and what a row lacks. Through the command line: tests/cli/test_score.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as _Tokenizer
from tokenizers.processors import TemplateProcessing

from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.mixed import Item, MixedReader
from rlhf_jax.data.tokenizer import BOS, Tokenizer
from rlhf_jax.errors import UserError


def _imported(begins: bool) -> Tokenizer:
    """A tokenizer as a Hugging Face directory has it, with or without a begin token before every text."""
    inner = _Tokenizer.from_str(Tokenizer.byte_level().to_json())
    if begins:
        inner.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return Tokenizer(inner, config={"bos_token": BOS})


def _read(jsonl, rows, tokenizer=None, template=None, **options) -> list[Item]:
    return list(MixedReader(tokenizer, template, vocab_size=264, **options).items(jsonl(rows)))


@pytest.mark.parametrize("begins", [True, False])
def test_text_is_what_transformers_reads(begins, jsonl, tok):
    plain = tok.encode("a b")[0].tolist()
    rows = [{"text": "a b"}, {"text": "a<|end|>"}]
    items = _read(jsonl, rows, _imported(begins))
    assert items[0].tokens.tolist() == [1] * begins + plain and items[0].completion is None
    assert items[1].tokens[-1] == tok.end_id, "control strings of a document are control tokens, as in transformers"
    ours = _read(jsonl, rows, tok)
    assert ours[0].tokens.tolist() == [tok.bos_id, *plain, tok.eos_id] and len(ours[1].tokens) == 1 + 8 + 1
    joined = _read(jsonl, [{"prompt": "a", "completion": " b<|end|>"}], _imported(begins), raw=True)[0]
    assert joined.tokens.tolist() == [1] * begins + plain + tok.encode("<|end|>", control=False)[0].tolist()
    assert joined.completion.tolist() == [False] * (begins + 1) + [True] * 9


def test_the_completion_of_a_conversation(jsonl, tok):
    template = ChatTemplate.load("plain", variables=tok.variables)
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": said}, {"prompt": "q", "completion": "a"}, {"prompt": said[:1], "response": said[1:]}, {"messages": said[:1]}]
    items = _read(jsonl, rows, tok, template)
    for item in items[:3]:
        assert tok.decode(item.tokens, skip_special=False) == "<|bos|><|user|>q<|end|><|assistant|>a<|end|>"
        assert tok.decode(item.tokens[item.completion], skip_special=False) == "a<|end|>"
    assert not items[3].completion.any(), "nobody has answered yet"
    assert [item.line for item in items] == [1, 2, 3, 4]


def test_token_ids_need_nothing_and_come_first(jsonl):
    row = {"token_ids": [5, 263], "loss_mask": [True, True], "text": "not read", "messages": "nor this"}
    item = _read(jsonl, [row])[0]
    assert item.tokens.tolist() == [5, 263] and item.completion.tolist() == [False, True], "nothing predicts the first token"
    assert item.tokens.dtype == np.int32
    cut = item.cut(1)
    assert (cut.tokens.tolist(), cut.completion.tolist(), cut.place) == ([5], [False], item.place)


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"text": "a"}, {}, "text expected a model with a tokenizer, got 'none'; buy one"),
        ({"messages": []}, {"tokenizer": Tokenizer.byte_level()}, "messages expected a model with a chat template, got 'none'; name it"),
        ({"text": ""}, {"tokenizer": _imported(False)}, "text expected at least one token"),
        ({"prompt": "", "completion": ""}, {"tokenizer": _imported(False), "raw": True}, "prompt . completion expected at least one token"),
        ({"prompt": 3, "completion": "a"}, {"tokenizer": _imported(False), "raw": True}, "prompt expected a string, got 3"),
        ({"prompt": "a", "completion": "b", "response": "c"}, {}, "row expected one of"),
    ],
)
def test_what_a_row_lacks_is_said_with_its_place(row, options, said, jsonl):
    with pytest.raises(UserError, match=rf"rows\.jsonl:2 {said}"):
        _read(jsonl, [{"token_ids": [1]}, row], missing={"tokenizer": "buy one", "template": "name it"}, **options)


def test_an_empty_file_is_a_mistake(jsonl):
    with pytest.raises(UserError, match="got an empty file"):
        _read(jsonl, [])


def test_a_template_that_refuses_is_named_with_the_row(jsonl, tok):
    template = ChatTemplate(json.loads('"{{ raise_exception(\'no system\') }}"'), name="strict", variables=tok.variables)
    with pytest.raises(UserError, match=r"rows\.jsonl:1 .*strict"):
        _read(jsonl, [{"prompt": "a", "completion": "b"}], tok, template)
