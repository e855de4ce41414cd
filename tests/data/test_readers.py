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
    ("row", "responses"),
    [
        ({"prompt": "q", "responses": ["g", "m", "b"]}, ("g", "m", "b")),
        ({"prompt": [u("q")], "responses": [[a("g")], "b"]}, ("g", "b")),
        ({"prompt": [u("q")], "responses": [[u("q"), a("g")], [a("b")]]}, ("g", "b")),
        ({"prompt": "q", "completions": ["b", "g", "m"], "scores": [-1, 2.5, 0]}, ("g", "m", "b")),
    ],
)
def test_ranking_formats(jsonl, row, responses):
    (record,) = read_records("ranking", jsonl([row]))
    assert (record.prompt, record.responses) == ((u("q"),), tuple((a(text),) for text in responses))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "completion": "r"}, (u("q"),)),
        ({"prompt": "q", "response": "r"}, (u("q"),)),
        ({"prompt": [u("q")], "completion": [a("r")]}, (u("q"),)),
        ({"prompt": [u("q")], "completion": [u("q"), a("r")]}, (u("q"),)),
        ({"messages": [u("q"), a("r")]}, (u("q"),)),
        ({"messages": [u("o"), a("x"), u("q"), a("r")]}, (u("o"), a("x"), u("q"))),
    ],
)
def test_judged_formats(jsonl, row, prompt):
    """The last message of a conversation is the one that is judged."""
    for desirable in (True, False):
        (record,) = read_records("feedback", jsonl([row | {"label": desirable}]))
        assert (record.prompt, record.response, record.desirable) == (prompt, (a("r"),), desirable)
    (record,) = read_records("rating", jsonl([row | {"score": 3}]))
    assert (record.prompt, record.response, record.score) == (prompt, (a("r"),), 3.0)


def test_stepwise_format(jsonl):
    (record,) = read_records("stepwise", jsonl([{"prompt": "q", "completions": ["one", "two "], "labels": [True, False]}]))
    assert (record.prompt, record.steps, record.labels) == ((u("q"),), ("one", "two "), (True, False))


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
    ("ranking", {"prompt": "q", "chosen": "x"}, r"responses expected prompt \+ responses \(best first\)"),
    ("ranking", {"prompt": "q", "completions": ["x", "y"]}, r"responses expected prompt \+ responses"),
    ("ranking", {"responses": ["x", "y"]}, r"responses expected prompt \+ responses"),
    ("ranking", {"prompt": "q", "responses": ["x"]}, r"responses expected a list of at least two responses, got \[\"x\"\]"),
    ("ranking", {"prompt": "q", "responses": "xy"}, r"responses expected a list of at least two responses, got 'xy'"),
    ("ranking", {"prompt": "q", "responses": ["x", 3]}, r"responses\[1\] expected a string or a list of messages, got 3"),
    ("ranking", {"prompt": "q", "responses": ["x", [u("y")]]}, r"responses\[1\] expected a response ending with an assistant"),
    ("ranking", {"prompt": "q", "completions": ["x", "y"], "scores": [1, 1]}, r"scores expected numbers that all differ, got \[1, 1\]"),
    ("ranking", {"prompt": "q", "completions": ["x", "y"], "scores": [1]}, r"scores expected a list of 2 numbers, one per completion, got \[1\]"),
    ("ranking", {"prompt": "q", "completions": ["x", "y"], "scores": [1, 2, 3]}, r"scores expected 2 numbers, one per completion"),
    ("ranking", {"prompt": "q", "completions": ["x", "y"], "scores": [1, "2"]}, r"scores\[1\] expected a finite number, got '2'"),
    ("feedback", {"prompt": "q", "label": True}, r"completion expected prompt \+ completion, prompt \+ response, or messages"),
    ("feedback", {"prompt": "q", "completion": "x"}, r"label expected true or false, got nothing"),
    ("feedback", {"prompt": "q", "completion": "x", "label": 1}, r"label expected true or false, got 1"),
    ("feedback", {"prompt": "q", "completion": "x", "label": "good"}, r"label expected true or false, got 'good'"),
    ("feedback", {"messages": [u("q")], "label": True}, r"messages expected a prompt and the answer to it"),
    ("feedback", {"messages": [a("x"), u("q")], "label": True}, r"messages expected a response ending with an assistant"),
    ("feedback", {"prompt": "q", "completion": [u("p"), a("x")], "label": True}, r"completion expected the same conversation as the prompt"),
    ("rating", {"prompt": "q", "completion": "x"}, r"score expected a finite number, got nothing"),
    ("rating", {"prompt": "q", "completion": "x", "score": "4/5"}, r"score expected a finite number, got '4/5'"),
    ("rating", {"prompt": "q", "completion": "x", "score": False}, r"score expected a finite number, got false"),
    ("rating", b'{"prompt": "q", "completion": "x", "score": Infinity}', r"score expected a finite number, got Infinity"),
    ("stepwise", {"prompt": "q", "completions": ["x"]}, r"completions expected prompt \+ completions \(the steps of one answer\) \+ labels"),
    ("stepwise", {"prompt": "q", "completions": "x", "labels": [True]}, r"completions expected a list of steps, got 'x'"),
    ("stepwise", {"prompt": "q", "completions": [], "labels": []}, r"completions expected a list of steps, got \[\]"),
    ("stepwise", {"prompt": "q", "completions": ["x", " "], "labels": [True, True]}, r"completions\[1\] expected a non-empty string, got ' '"),
    ("stepwise", {"prompt": "q", "completions": ["x", "y"], "labels": [True]}, r"labels expected 2 labels, one per step, got \[true\]"),
    ("stepwise", {"prompt": "q", "completions": ["x"], "labels": [0]}, r"labels\[0\] expected true or false, got 0"),
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
    "ranking": {"prompt": "q", "responses": ["x", "y"]},
    "feedback": {"prompt": "q", "completion": "x", "label": True},
    "rating": {"prompt": "q", "completion": "x", "score": 1.5},
    "stepwise": {"prompt": "q", "completions": ["x"], "labels": [True]},
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


def test_tools_and_what_belongs_to_them(jsonl):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}], "reasoning_content": "hm"}
    row = {"messages": [u("q"), call, {"role": "tool", "content": "4", "tool_call_id": "1", "name": "f"}, a("r")], "tools": [{"name": "f"}]}
    (record,) = read_records("demo", jsonl([row]))
    assert record.messages[1] == {**call, "content": ""} and record.messages[2] == row["messages"][2] and record.tools == ({"name": "f"},)
    (record,) = read_records("prompt", jsonl([{"prompt": "q", "tools": [{"name": "f"}], "answer": 4}]))
    assert record.tools == ({"name": "f"},) and record.reference == {"answer": 4}
    (record,) = read_records("preference", jsonl([{"prompt": "q", "chosen": "a", "rejected": "b"}]))
    assert record.tools == ()


@pytest.mark.parametrize(("change", "message"), [
    ({"tools": "f"}, r"rows.jsonl:1 tools expected a list of objects, got 'f'"),
    ({"tools": [1]}, r"rows.jsonl:1 tools expected a list of objects, got \[1\]"),
    ({"messages": [u("q"), {**a("r"), "tool_calls": {"x": 1}}]}, r"messages\[1\].tool_calls expected a list of objects"),
    ({"messages": [u("q"), {**a("r"), "name": 3}]}, r"messages\[1\].name expected a string, got 3"),
    ({"messages": [u("q"), {"role": "assistant", "content": None, "tool_calls": []}]}, r"messages\[1\].content expected a string, got nothing"),
    ({"tools": [{"name": "\ud800"}]}, r"tools expected valid Unicode"),
])
def test_malformed_tools(jsonl, change, message):
    with pytest.raises(UserError, match=message):
        list(read_records("demo", jsonl([{"messages": [u("q"), a("r")]} | change])))
