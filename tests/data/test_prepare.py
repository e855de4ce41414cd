import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from rlhf_jax.data import prepare as module
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.prepare import prepare
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

PLAIN = ChatTemplate.load("plain")
ROWS = [{"prompt": f"question {i}", "response": "x" * (i % 5 + 1)} for i in range(40)]


@pytest.fixture
def run(tmp_path, tok):
    def call(kind, path, tokenizer=tok, **options):
        options = {"max_length": 64, "prompt_length": 64, "overlong": "error", "cache": tmp_path / "cache"} | options
        return prepare(kind, path, tokenizer, None if kind == "text" else PLAIN, **options)

    return call


def folders(tmp_path):
    return sorted(os.listdir(tmp_path / "cache")) if (tmp_path / "cache").exists() else []


def test_rows_come_back_in_file_order_with_their_lengths(run, jsonl, tok):
    path = jsonl(ROWS)
    made = run("demo", path)
    assert len(made) == 40
    for i, row in enumerate(ROWS):
        got = made[i]
        assert tok.decode(got["tokens"][got["loss_mask"]], skip_special=False) == row["response"] + "<|end|>"
        assert (int(got["line"]), got["source"]) == (i + 1, "rows.jsonl")
        assert made.lengths[i].tolist() == [len(got["tokens"])]
        assert made.head_lengths[i].tolist() == [len(row["response"]) + 1]
    assert made.stats["read"] == made.stats["kept"] == 40
    assert made.stats["tokens"] == made.lengths.sum() and made.stats["loss_tokens"] == made.head_lengths.sum()
    for index in (-1, 40):
        with pytest.raises(IndexError):
            made[index]


def test_order_holds_over_many_rows(run, jsonl):
    made = run("text", jsonl([{"text": f"t{i}"} for i in range(3000)]))
    assert [int(made[i]["line"]) for i in range(3000)] == list(range(1, 3001))


def test_the_other_kinds(run, jsonl):
    pairs = run("preference", jsonl([{"prompt": "q", "chosen": "good", "rejected": "b", "margin": 2}], "p.jsonl"))
    assert pairs.lengths.tolist() == [[10, 7]] and pairs.head_lengths.tolist() == [[5, 2]] and pairs[0]["margin"] == np.float32(2)
    prompts = run("prompt", jsonl([{"prompt": "é", "answer": 3}], "q.jsonl"))
    assert json.loads(prompts[0]["messages"]) == [{"role": "user", "content": "é"}] and json.loads(prompts[0]["reference"]) == {"answer": 3}
    assert prompts.head_lengths.tolist() == [[0]]
    ranked = run("ranking", jsonl([{"prompt": "q", "responses": ["abc", "d"]}, {"prompt": "q", "responses": ["", "ef", "g"]}], "r.jsonl"))
    assert ranked.lengths.tolist() == [[9, 7, 0], [6, 8, 7]] and ranked.head_lengths.tolist() == [[4, 2, 0], [1, 3, 2]]
    assert ranked[1]["sizes"].tolist() == [6, 8, 7] and ranked.stats["longest"] == 9
    thumbs = run("feedback", jsonl([{"prompt": "q", "completion": "r", "label": flag} for flag in (True, False)], "f.jsonl"))
    assert [bool(thumbs[i]["desirable"]) for i in (0, 1)] == [True, False] and thumbs.stats["desirable"] == 1
    rated = run("rating", jsonl([{"prompt": "q", "completion": "r", "score": -1.5}], "s.jsonl"))
    assert rated[0]["score"] == np.float32(-1.5) and rated.lengths.tolist() == [[7]]
    steps = run("stepwise", jsonl([{"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}], "t.jsonl"))
    assert steps[0]["steps"].tolist() == [5, 8] and steps[0]["labels"].tolist() == [True, False] and steps.stats["steps"] == 2


def test_reused_until_something_changes(run, jsonl, tmp_path, monkeypatch):
    path = jsonl(ROWS)
    first = run("demo", path)
    stamp = os.stat(first.folder).st_mtime_ns
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("built twice"))
    assert run("demo", path).folder == first.folder and os.stat(first.folder).st_mtime_ns == stamp
    assert run("demo", path, prompt_length=3).folder == first.folder  # no option of this kind
    monkeypatch.undo()
    bpe = Tokenizer.train_bpe([row["prompt"] for row in ROWS], 270)
    seen = {first.folder, run("demo", path, max_length=65).folder, run("demo", path, overlong="skip").folder, run("demo", path, bpe).folder}
    again = run("demo", jsonl(ROWS[:-1]))
    assert len(seen | {again.folder}) == 5 and len(again) == 39
    assert len(folders(tmp_path)) == 5


def test_a_bad_row_leaves_nothing(run, jsonl, tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl:41 row expected valid JSON"):
        run("demo", jsonl([*ROWS, b"{"]))
    assert folders(tmp_path) == []


def test_nothing_kept(run, jsonl, tmp_path):
    with pytest.raises(UserError, match=r"expected at least one to be kept, got none; see config\.data\.overlong"):
        run("demo", jsonl([{"prompt": "q", "response": "xxxx"}]), max_length=7, overlong="skip")
    assert folders(tmp_path) == []


def test_skipped_and_truncated_rows_are_counted(run, jsonl):
    rows = [{"prompt": "q", "response": "x" * n} for n in (3, 30, 4)]
    skipped = run("demo", jsonl(rows), max_length=12, overlong="skip")
    assert skipped.stats["skipped"] == {"longer than config.data.max_length": 1} and len(skipped) == 2
    assert [int(skipped[i]["line"]) for i in range(2)] == [1, 3]
    cut = run("demo", jsonl(rows), max_length=12, overlong="truncate")
    assert cut.stats["truncated"] == 1 and cut.lengths.max() == 12 and len(cut) == 3


def test_another_process_that_is_faster(run, jsonl, tmp_path, monkeypatch):
    path, write, turns = jsonl(ROWS), module._write, []

    def slow(*args):
        if not turns:
            turns.append(1)
            assert len(run("demo", path)) == 40  # the other one, from start to end
        write(*args)

    monkeypatch.setattr(module, "_write", slow)
    assert len(run("demo", path)) == 40
    assert len(folders(tmp_path)) == 1


SCRIPT = """
    import os, signal, sys
    from rlhf_jax.data import prepare as module
    from rlhf_jax.data.tokenizer import Tokenizer
    options = dict(max_length=64, prompt_length=None, overlong="error", cache=sys.argv[2])
    if sys.argv[3] == "kill":
        module.np.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    made = module.prepare("text", sys.argv[1], Tokenizer.byte_level(), None, **options)
    print(len(made), [int(made[i]["line"]) for i in range(len(made))], "tensorflow" in sys.modules, "jax" in vars(module))
"""


def script(*args):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, args)], capture_output=True, text=True, check=False)


def test_killed_in_the_middle_then_again_without_tensorflow_or_noise(jsonl, tmp_path):
    path, cache = jsonl([{"text": "a"}, {"text": "b"}]), tmp_path / "cache"
    dead = script(path, cache, "kill")
    assert dead.returncode == -signal.SIGKILL
    left = folders(tmp_path)
    assert len(left) == 1 and left[0].startswith(".text-")  # rows written, not complete, not taken for it
    again = script(path, cache, "go")
    assert (again.returncode, again.stdout, again.stderr) == (0, "2 [1, 2] False False\n", "")
    (name,) = folders(tmp_path)
    assert name.startswith("text-")
    assert sorted(os.listdir(cache / name)) == ["head_lengths.npy", "lengths.npy", "rows", "stats.json"]
    assert [p.suffix for p in pathlib.Path(cache, name).rglob("*array_record*")] == [".array_record-00000-of-00001"]


def test_no_module_of_the_room_imports_jax_itself():
    room = pathlib.Path(module.__file__).parent
    lines = [(p.name, line) for p in room.glob("*.py") for line in p.read_text().splitlines()]
    bad = ("import jax", "from jax", "import tensorflow as", "import tensorflow\n", "from tensorflow ")
    assert not [(name, line) for name, line in lines if line.strip().startswith(bad)]


def test_a_damaged_set_is_named(run, jsonl):
    made = run("demo", jsonl(ROWS))
    np.save(os.path.join(made.folder, "lengths.npy"), made.lengths[:-1])
    with pytest.raises(UserError, match="expected 39 rows, got 40; delete the folder"):
        run("demo", jsonl(ROWS))
