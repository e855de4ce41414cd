import os
import re

import pytest

from rlhf_jax.data.readers import data_files, read_records
from rlhf_jax.errors import UserError


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "messages", "context"),
    [
        ({"messages": [u("q"), a("r")]}, (u("q"), a("r")), 0),
        ({"prompt": "q", "completion": "r"}, (u("q"), a("r")), 1),
        ({"prompt": [u("q"), a("x"), u("y")], "completion": [a("r")]}, (u("q"), a("x"), u("y"), a("r")), 3),
        ({"instruction": "q", "input": "", "output": "r"}, (u("q"), a("r")), 1),
        ({"instruction": "q", "input": "i", "output": "r"}, (u("q\n\ni"), a("r")), 1),
        ({"prompt": "q", "response": "r", "extra": 1}, (u("q"), a("r")), 1),
    ],
)
def test_demo_formats(jsonl, row, messages, context):
    path = jsonl([row])
    (record,) = read_records("demo", path)
    assert (record.messages, record.context, record.source, record.line) == (messages, context, path, 1)


@pytest.mark.parametrize(
    ("row", "margin"),
    [
        ({"prompt": "q", "chosen": "g", "rejected": "b"}, None),
        ({"prompt": "q", "chosen": "g", "rejected": "b", "margin": 2}, 2.0),
        ({"prompt": [u("q")], "chosen": [a("g")], "rejected": [a("b")]}, None),
        ({"chosen": [u("q"), a("g")], "rejected": [u("q"), a("b")]}, None),
        ({"prompt": "q", "chosen": [u("q"), a("g")], "rejected": [u("q"), a("b")]}, None),
    ],
)
def test_preference_formats(jsonl, row, margin):
    (record,) = read_records("preference", jsonl([row]))
    assert (record.prompt, record.chosen, record.rejected, record.margin) == ((u("q"),), (a("g"),), (a("b"),), margin)


def test_identical_conversations_keep_an_answer_each(jsonl):
    (record,) = read_records("preference", jsonl([{"chosen": [u("q"), a("g")], "rejected": [u("q"), a("g")]}]))
    assert (record.prompt, record.chosen, record.rejected) == ((u("q"),), (a("g"),), (a("g"),))


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "q"}, None),
        ({"prompt": [u("q")], "reference": {"answer": 3}}, {"answer": 3}),
        ({"messages": [u("q")], "answer": "3"}, {"answer": "3"}),
        ({"prompt": "q", "reference": {}, "answer": 1}, {}),
    ],
)
def test_prompt_formats(jsonl, row, reference):
    (record,) = read_records("prompt", jsonl([row]))
    assert (record.messages, record.reference) == ((u("q"),), reference)


BAD = [
    ("demo", b"{", r"row expected valid JSON, got '\{' \(Expecting"),
    ("demo", b"[1]", r"row expected a JSON object, got \[1\]"),
    ("demo", b'{"text": "\xff"}', r"row expected UTF-8, got byte 0xff"),
    ("demo", b"[" * 100_000, r"row expected valid JSON"),
    ("demo", {"text": "x"}, r"messages expected messages, prompt \+ completion.*got fields \['text'\]"),
    ("demo", {"messages": []}, r"messages expected a non-empty list of messages, got \[\]"),
    ("demo", {"messages": "x"}, r"messages expected a non-empty list of messages, got 'x'"),
    ("demo", {"messages": [u("q")]}, r"messages expected an assistant message to learn from, got none"),
    ("demo", {"messages": ["q"]}, r'messages\[0\] expected an object with "role" and "content", got \'q\''),
    ("demo", {"messages": [u("q"), {"role": "bot", "content": "x"}]}, r"messages\[1\].role expected one of system.*got 'bot'"),
    ("demo", {"messages": [u("q"), {"role": ["x"], "content": "x"}]}, r"messages\[1\].role expected one of"),
    ("demo", {"messages": [u("q"), {"role": "assistant"}]}, r"messages\[1\].content expected a string, got nothing"),
    ("demo", {"messages": [u("q"), a(["x"])]}, r"messages\[1\].content expected a string, got \[\"x\"\]"),
    ("demo", b'{"prompt": "q", "response": "\\ud800"}', r"response expected valid Unicode, got '\\ud800'"),
    ("demo", {"instruction": " ", "output": "r"}, r"instruction expected a non-empty string, got ' '"),
    ("demo", {"prompt": 3, "completion": "x"}, r"prompt expected a string or a list of messages, got 3"),
    ("preference", {"prompt": "q", "chosen": "x"}, r"chosen expected prompt \+ chosen \+ rejected"),
    ("preference", {"chosen": "x", "rejected": "y"}, r"prompt expected a string or a list of messages"),
    ("preference", {"chosen": [u("q"), a("x")], "rejected": [u("p"), a("x")]}, r"chosen expected a beginning in common"),
    ("preference", {"prompt": "q", "chosen": [u("x")], "rejected": "y"}, r"chosen expected a response ending with an assistant"),
    ("preference", {"prompt": "q", "chosen": [u("p"), a("x")], "rejected": "y"}, r"chosen expected the same conversation as the prompt"),
    ("preference", {"prompt": "q", "chosen": "x", "rejected": "y", "margin": "big"}, r"margin expected a finite number, got 'big'"),
    ("preference", {"prompt": "q", "chosen": "x", "rejected": "y", "margin": True}, r"margin expected a finite number, got true"),
    ("preference", b'{"prompt": "q", "chosen": "x", "rejected": "y", "margin": NaN}', r"margin expected a finite number, got NaN"),
    ("preference", {"prompt": "q", "chosen": "x", "rejected": "y", "margin": 10**400}, r"margin expected a finite number"),
    ("prompt", {"text": "x"}, r"prompt expected prompt"),
    ("prompt", {"messages": [u("q"), a("r")]}, r"messages expected a conversation that waits for an answer"),
    ("prompt", {"prompt": "q", "reference": "3"}, r"reference expected an object, got '3'"),
    ("text", {"text": ""}, r"text expected a non-empty string, got ''"),
    ("text", {"text": 3}, r"text expected a string, got 3"),
    ("text", {"prompt": "x"}, r"text expected a string, got fields \['prompt'\]"),
]
GOOD = {
    "demo": {"prompt": "q", "response": "r"},
    "preference": {"prompt": "q", "chosen": "x", "rejected": "y"},
    "prompt": {"prompt": "q"},
    "text": {"text": "x"},
}


@pytest.mark.parametrize(("kind", "row", "message"), BAD)
def test_malformed_rows_name_file_line_field_and_remedy(jsonl, kind, row, message):
    path = jsonl([GOOD[kind], row])
    with pytest.raises(UserError) as caught:
        list(read_records(kind, path))
    text = str(caught.value)
    assert re.fullmatch(re.escape(f"{path}:2 ") + r"\S+ expected .+, got .+; .+", text, re.DOTALL), text
    assert "\n" not in text
    assert re.search(message, text), text


def test_bom_crlf_blank_lines_and_line_separators(jsonl):
    path = jsonl([{"text": "a"}, b"", b'{"text": "b\xe2\x80\xa8c"}'], ending=b"\r\n", start=b"\xef\xbb\xbf")
    assert [(r.text, r.line) for r in read_records("text", path)] == [("a", 1), ("b\u2028c", 3)]


def test_no_newline_at_the_end(jsonl, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}')
    assert [r.text for r in read_records("text", tmp_path / "x.jsonl")] == ["a", "b"]


def test_lists_and_folders(jsonl, tmp_path):
    first, second = jsonl([{"text": "a"}], "2.jsonl"), jsonl([{"text": "b"}], "1.jsonl")
    (tmp_path / "notes.txt").write_text("no data")
    assert [r.text for r in read_records("text", [first, second])] == ["a", "b"]
    assert [r.text for r in read_records("text", tmp_path)] == ["b", "a"]


def test_paths_that_are_no_data(jsonl, tmp_path):
    empty, blank, good = jsonl([], "e.jsonl"), jsonl([b"", b" "], "b.jsonl"), jsonl([{"text": "x"}])
    (tmp_path / "x.json").write_text("{}")
    os.mkdir(tmp_path / "none")
    for path, message in [
        (empty, "e.jsonl:1 row expected a JSON object, got an empty file"),
        ([good, blank], "b.jsonl:1 row expected a JSON object, got an empty file"),
        (str(tmp_path / "missing.jsonl"), "got nothing there"),
        (str(tmp_path / "x.json"), "expected a .jsonl file, got another ending"),
        (str(tmp_path / "none"), "expected .jsonl files in the folder, got none"),
        ([good, good], "expected each file once, got it twice"),
        ([], "got an empty list"),
        ("", "got nothing there"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            list(read_records("text", path))
    with pytest.raises(UserError, match="did you mean 'prompt'"):
        list(read_records("promt", good))
    assert data_files(good) == [good]
