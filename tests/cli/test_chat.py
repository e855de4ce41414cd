"""`rlhf-jax chat` through the real command line: a pipe of lines, the commands, the same words as `sample`, and every bad input."""

from __future__ import annotations

import io
import json
import pathlib

import pytest

from rlhf_jax.cli import chat as module
from rlhf_jax.data.tokenizer import Tokenizer
from tests.cli.conftest import Command, Outcome
from tests.cli.saved import GOLDEN, config, write_run
from tests.train.runs import rows


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return write_run(tmp_path_factory.mktemp("saved") / "policy", config())


class Talk:
    """`talk(lines, flags …)`: the command with these lines on its standard input."""

    def __init__(self, command: Command, monkeypatch: pytest.MonkeyPatch, run: pathlib.Path) -> None:
        self.command, self.monkeypatch, self.run = command, monkeypatch, run

    def __call__(self, lines: str, *flags: str) -> Outcome:
        self.monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return self.command("chat", f"--model={self.run}", "--max_new_tokens=6", "--temperature=0", *flags)


@pytest.fixture
def talk(command: Command, monkeypatch: pytest.MonkeyPatch, run: pathlib.Path) -> Talk:
    return Talk(command, monkeypatch, run)


@pytest.mark.parametrize("flags", [["--temperature=0"], ["--temperature=0.9", "--top_k=50", "--top_p=0.95", "--seed=4"]])
def test_the_first_answer_is_what_sample_says(talk, command, run, flags):
    sampled = command("sample", f"--checkpoint={run}", "--prompt=Sort 5 3", "--max_new_tokens=6", *flags)
    assert sampled.code == 0, sampled.err
    assert talk("Sort 5 3\n", *flags).out == sampled.out


def test_filters_and_stop_strings_are_those_of_sample(talk, command, run):
    letters = Tokenizer.byte_level().encode("abc")[0].tolist()
    flags = [f"--filters=allowed:ids={letters}", "--filters=frequency_penalty:penalty=0.5", "--stop_strings=cc", "--temperature=1.5", "--seed=3"]
    sampled = command("sample", f"--checkpoint={run}", "--prompt=Sort 5 3", "--max_new_tokens=30", *flags)
    assert sampled.code == 0 and set(sampled.out.strip()) <= set("abc") and sampled.out.endswith("cc\n") and "cc" not in sampled.out[:-3], sampled
    assert talk("Sort 5 3\n", "--max_new_tokens=30", *flags).out == sampled.out
    assert "--filters[0].name = 'min_q'" in talk("hi\n", "--filters=min_q:p=0.1").err


def test_a_conversation_through_a_pipe(talk, tmp_path):
    once = talk("hi\n")
    assert once.code == 0 and once.err == "" and once.out.count("\n") >= 1
    assert talk("hi").out == talk("hi\r\n\n  \n").out == once.out, "a last line needs no end, and blank lines are none"
    two = talk(f"hi\nand\n/save {tmp_path / 'talk.jsonl'}\n/undo\nand\n/exit\nnever read\n")
    assert two.out.startswith(once.out)
    rest = two.out.removeprefix(once.out)
    assert rest[: len(rest) // 2] == rest[len(rest) // 2 :] != "", "taken back and said again, a greedy answer is the same"
    saved = rows(tmp_path / "talk.jsonl")
    assert [message["role"] for message in saved[0]["messages"]] == ["user", "assistant"] * 2
    assert f"4 messages in {tmp_path / 'talk.jsonl'}\ntaken back\n" == two.err


def test_the_context_the_precision_and_the_devices_that_are_asked_for(talk):
    once = talk("hi\n").out
    assert talk("hi\n", "--tensor=2").out == once
    assert talk("hi\n", "--dtype=bfloat16").code == 0
    short = talk("a message of many words\n", "--context=20")
    assert "the message takes 27 tokens with what must go with it, and the model reads 20" in short.err


def test_system_messages_and_beginning_anew(talk):
    plain, brief = talk("hi\n").out, talk("hi\n", "--system=be brief").out
    assert plain != brief
    assert talk("/system be brief\nhi\n").out == brief
    assert talk("x\n/reset\nhi\n", "--system=be brief").out.endswith(brief)
    assert talk("/system\nhi\n", "--system=be brief").out == plain
    assert talk("//help\n").out == talk("/help\n").out + talk("//help\n").out != ""


def test_what_a_command_refuses_does_not_end_the_talk(talk, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    done = talk(f"/rest\n/undo\n/undo now\n/save\n/save {taken}\n{'x' * 100}\n/save {taken}/x\nhi\n")
    assert done.code == 0 and done.out == talk("hi\n").out and taken.read_text() == "mine"
    said = done.err.splitlines()
    assert "/rest is no command (did you mean '/reset'?)" in said[0] and said[1] == "nothing to take back"
    assert "/undo takes nothing behind it, got 'now'" in said[2] and "/save needs a file" in said[3] and "exists: name another file" in said[4]
    assert "the message takes 104 tokens" in said[5] and "shorten it" in said[5]
    assert "choose another path" in said[6]


def test_a_full_context_forgets_the_oldest_turns_and_says_so(talk):
    done = talk("question one, a long one\n" * 4)
    assert done.code == 0
    assert done.err.splitlines()[-1].startswith("rlhf-jax: the context of 96 tokens is full: the oldest ")


def test_in_a_terminal(talk, monkeypatch):
    lines = iter(["hi", "/help", "/reset"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    talk.monkeypatch = type("Same", (), {"setattr": lambda _, name, value: monkeypatch.setattr(name, Terminal())})()
    done = talk("")
    assert done.code == 0 and done.err == ""
    said = done.out.splitlines()
    assert said[0] == "A line is a message; /help lists the commands." and said[-1] == "a new conversation"
    assert "/undo         takes back the last message" in done.out
    assert not set(done.out) & set(map(chr, module.UNSEEN))


def _complains(done: Outcome, *said: str) -> None:
    assert done.code == 2 and done.out == "", done
    assert done.err.startswith("rlhf-jax: ") and done.err.count("\n") == 1, done.err
    for part in said:
        assert part in done.err, done.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model="], ["--model is missing"]),
        (["--model=nowhere"], ["--model = 'nowhere'", "does not exist"]),
        (["--model={reward}"], ["--model = ", "is a reward checkpoint: name a policy's run"]),
        (["--model={llama}"], ["--model = ", "tokenizer"]),
        (["--model={base}"], ["has no chat template: it is a base model; name one with --template"]),
        (["--template=plan"], ["--template = 'plan'", "'plain'"]),
        (["--top_p=0"], ["--top_p = 0.0"]),
        (["--max_new_tokens=0"], ["max_new_tokens"]),
        (["--tensor=9"], ["--tensor = 9", "9 devices"]),
        (["--tensor=3"], ["--tensor = 3", "does not divide"]),
        (["--dtype=float16"], ["--dtype", "float16"]),
        (["--temprature=1"], ["temprature", "temperature"]),
        (["hello"], ["'hello' is no flag"]),
    ],
)
def test_a_bad_command_line_is_one_sentence(flags, said, talk, run, tmp_path):
    paths = {"llama": GOLDEN / "llama"}
    if "{reward}" in flags[0]:
        paths["reward"] = write_run(tmp_path / "reward", config("reward"))
    if "{base}" in flags[0]:
        paths["base"] = write_run(tmp_path / "base", config())
        (paths["base"] / "template.jinja").unlink()
    _complains(talk("hi\n", *(flag.format(**paths) for flag in flags)), *said)


def test_a_base_model_talks_with_a_template(talk, run, tmp_path):
    base = write_run(tmp_path / "base", config())
    (base / "template.jinja").unlink()
    assert talk("hi\n", f"--model={base}", "--template=plain").out == talk("hi\n").out


def test_a_line_that_is_no_text(talk):
    done = talk("\udcff\nhi\n")
    assert done.code == 0 and done.err == "rlhf-jax: the message is not UTF-8 text\n" and done.out == talk("hi\n").out


def test_help_lists_flags_and_commands(command):
    done = command("chat", "--help")
    assert done.code == 0 and all(name in done.out for name in ("--system", *module.COMMANDS[:-1]))


def test_saved_rows_are_training_data(talk, command, run, tmp_path):
    path = tmp_path / "talk.jsonl"
    talk(f"hi\n/save {path}\n")
    done = command("score", f"--model={run}", f"--input={path}", f"--output={tmp_path / 'scored.jsonl'}")
    assert done.code == 0, done.err
    row = json.loads((tmp_path / "scored.jsonl").read_text())
    said = [token for token, is_said in zip(row["token_ids"], row["loss_mask"], strict=True) if is_said]
    assert Tokenizer.byte_level().decode(said, skip_special=False) == row["messages"][1]["content"] + "<|end|>"
