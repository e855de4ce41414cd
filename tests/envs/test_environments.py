"""The two embedded environments, the registry, and the guide: pure, seeded, picklable, and patient with any text."""

from __future__ import annotations

import inspect
import json
import pathlib
import pickle
import re
import sys
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import envs
from rlhf_jax.data import hf_tokenizer
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.readers import read_records
from rlhf_jax.envs import calculator, tasks
from rlhf_jax.envs.calculator import Calculator, final_number
from rlhf_jax.envs.guess import Guess
from rlhf_jax.envs.tool_calls import write
from rlhf_jax.errors import UserError
from tests.data.families import FAMILIES

README = (pathlib.Path(envs.__file__).parent / "README.md").read_text()
ASKED = [{"role": "user", "content": "?"}]


def call(expression: str) -> str:
    return write("calculator", {"expression": expression})


# --- the calculator ---


def test_a_question_with_a_call() -> None:
    env = Calculator()
    state = env.reset(ASKED, {"answer": 272}, 0)
    step = env.step(state, f"Let me see. {call('34*8')}")
    assert step.replies == ({"role": "tool", "content": "272", "name": "calculator"},) and (step.reward, step.done) == (0.0, False)
    assert step.counts == {"tool_calls": 1, "tool_errors": 0, "malformed_calls": 0}
    end = env.step(step.state, "It is 272.")
    assert (end.reward, end.done, end.replies) == (1.0, True, ())
    assert env.step(state, "It is 271.").reward == 0.0 and env.step(state, "no idea").done


def test_several_calls_and_what_is_wrong_with_them() -> None:
    env = Calculator(role="user")
    state = env.reset(ASKED, {"answer": "1/2"}, 0)
    text = call("1/4*2") + call("1/0") + "<tool_call>{</tool_call>" + write("clock", {}) + write("calculator", {"x": 1}) + call("2")[:-1]
    step = env.step(state, text)
    assert step.counts == {"tool_calls": 2, "tool_errors": 1, "malformed_calls": 4}
    (reply,) = step.replies
    lines = [line.removeprefix("<tool_response>").removesuffix("</tool_response>") for line in reply["content"].split("\n")]
    assert reply["role"] == "user" and lines[0] == "0.5" and len(lines) == 6
    assert all(line.startswith("error: ") for line in lines[1:]) and "'clock'" in lines[3]
    many = env.step(state, call("1") * (calculator.CALLS + 3))
    assert many.counts["tool_calls"] == calculator.CALLS and many.counts["malformed_calls"] == 3


@pytest.mark.parametrize(
    ("text", "number"),
    [("12 or 13", 13), ("<answer>5</answer> 7", 5), ("<answer>5</answer><answer> is 6.</answer>", 6), ("1/4", 0.25), ("-0.5", -0.5), ("1/0", None),
     ("none", None), ("<answer>none</answer> 3", None), ("9" * 5000, None), ("9" * 64 + "7", 10**65 - 3), ("1.5/2", 0.75),
     ("3/1.5", 2), ("1.5/0.0", None), ("2,992", 2992), ("-1,234,567.5", -1234567.5), ("1,2,3", 3), ("12345,678", 678), ("1e-05", Fraction(1, 10**5)),
     ("2.5E3", 2500), ("1e9999", None), (".5", 0.5), ("It is 18.", 18)],
)
def test_final_number(text: str, number: Any) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize("answer", [1e-05, 0.1, -2.5e20, 1e300])
def test_an_answer_may_be_any_float(answer: float) -> None:
    env = Calculator()
    assert env.step(env.reset(ASKED, {"answer": answer}, 0), f"It is {answer}.").reward == 1.0


@pytest.mark.parametrize("reference", [None, {}, {"answer": None}, {"answer": True}, {"answer": "many"}, {"answer": [1]}, {"answer": float("nan")},
                                       {"answer": float("inf")}])
def test_a_row_without_an_answer(reference: Any) -> None:
    with pytest.raises(ValueError, match="answer"):
        Calculator().reset(ASKED, reference, 0)


def test_a_template_with_tools_writes_the_schema(tmp_path: pathlib.Path) -> None:
    """As rows of a prompt file list it under `tools`."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "What is 34*8?", "answer": 272, "tools": [calculator.SCHEMA]}) + "\n")
    (record,) = read_records("prompt", path)
    tokenizer, template = hf_tokenizer.read(FAMILIES["qwen2.5"].write(tmp_path / "qwen"))
    assert tokenizer is not None and record.reference == {"answer": 272}
    encoder = Encoder(tokenizer, template, max_length=512, prompt_length=None, overlong="error")
    assert '"name":"calculator"' in tokenizer.decode(encoder.prompt(record.messages, record.tools)).replace(" ", "")


# --- the guessing game ---


def test_a_game() -> None:
    env = Guess(low=1, high=15, turn_cost=0.25)
    state = env.reset(ASKED, {"secret": 5}, 0)
    said = []
    for text in ("8", "I say 4.", "hm"):
        step = env.step(state, text)
        state, said = step.state, [*said, step.replies[0]["content"]]
        assert not step.done and step.reward == 0.0
    assert said == ["lower", "higher", "say a whole number from 1 to 15"] and step.counts == {"guesses": 0, "malformed_guesses": 1}
    end = env.step(state, "5!")
    assert end.done and end.reward == 0.25 and end.counts == {"guesses": 1, "malformed_guesses": 0}
    assert Guess(turn_cost=1.0).step(state, "5").reward == 0.0


@pytest.mark.parametrize(("text", "guess"), [("7" + "0" * 29 + "7", None), ("0" * 29 + "7", None), ("5,007", 5007), ("1.5, or 7", 7), ("1, 7", 1),
                                              ("it is 7.", 7), ("...7", 7), ("-7", -7), ("30" * 9, int("30" * 9))])
def test_a_guess_is_a_whole_number_and_no_part_of_one(text: str, guess: int | None) -> None:
    step = Guess(low=-10, high=10**18).step(Guess(low=-10, high=10**18).reset(ASKED, {"secret": 7 if guess is None else guess}, 0), text)
    assert step.done == (guess is not None) and step.counts["malformed_guesses"] == (guess is None)


def test_the_seed_draws_the_number() -> None:
    env = Guess(low=1, high=100)
    secrets = [env.reset(ASKED, None, seed).secret for seed in range(400)]
    assert secrets == [env.reset(ASKED, None, seed).secret for seed in range(400)]
    assert min(secrets) <= 5 and max(secrets) >= 96 and len(set(secrets)) > 80
    assert env.reset(ASKED, {"low": 3, "high": 4}, 9).secret in (3, 4)


@pytest.mark.parametrize("reference", [{"low": 5, "high": 5}, {"low": "1"}, {"secret": 99}, {"secret": 1.5}, {"high": True}])
def test_a_row_that_is_no_game(reference: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="guessing game"):
        Guess().reset(ASKED, reference, 0)


# --- both ---

ALL: list[tuple[Any, dict[str, Any]]] = [(Calculator(), {"answer": 3}), (Calculator(role="user"), {"answer": 3}), (Guess(), {})]
PIECES = ["<tool_call>", "</tool_call>", '{"name":"calculator",', '"arguments":', '{"expression":"1/0"}', "}", "7", ".5", "/2", "1e-5"]
TEXTS = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)


@pytest.mark.parametrize(("env", "reference"), ALL)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_any_text_is_answered_the_same_twice(env: Any, reference: dict[str, Any], text: str) -> None:
    state = env.reset(ASKED, reference, 4)
    copied = pickle.loads(pickle.dumps(state))
    assert copied == state
    first, second = env.step(state, text), env.step(copied, text)
    assert first == second and state == copied  # nothing was changed in place
    assert set(first.counts) <= set(env.counters) and (first.done or first.replies)
    assert all(message["role"] in ("tool", "user") and message["content"] for message in first.replies)
    assert pickle.loads(pickle.dumps(first)) == first


# --- the registry ---


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("calculater", {}, ("config.env.name", "calculater", "'calculator'")),
        ("no_such_module.Env", {}, ("config.env.name", "no_such_module", "PYTHONPATH")),
        ("rlhf_jax.envs.guess.Gues", {}, ("config.env.name", "'Guess'")),
        ("guess", {"hight": 3}, ("config.env.parameters.hight", "'high'")),
        ("guess", {"high": "3"}, ("config.env.parameters.high", "'3'", "int")),
        ("guess", {"turn_cost": True}, ("config.env.parameters.turn_cost", "float")),
        ("guess", {"high": 1}, ("config.env.parameters.low = 1", "high = 1")),
        ("calculator", {"role": "system"}, ("config.env.parameters.role", "system")),
        ("fractions.Fraction", {}, ("Fraction", "role, counters, reset, step")),
    ],
)
def test_what_cannot_be_made(name: str, parameters: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        envs.load(name, parameters)
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_names_are_made_with_their_parameters() -> None:
    assert envs.load("guess", {"high": 9, "turn_cost": 1}) == Guess(high=9, turn_cost=1)
    assert envs.load("rlhf_jax.envs.guess:Guess", {"low": 2}) == Guess(low=2)


# --- the guide ---


def test_the_table_is_the_codes() -> None:
    lines = README.split("<!-- names -->\n")[1].split("<!-- end of names -->")[0].strip().split("\n")[2:]
    rows = {cells[0].strip("`"): cells[1:] for cells in ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines)}
    assert set(rows) == set(envs.NAMES)
    for name, (parameters, counts, _) in rows.items():
        known = {p.name: p.default for p in inspect.signature(envs.NAMES[name]).parameters.values()}
        assert {key: json.loads(value) for key, value in re.findall(r"`(\w+)=([^`]*)`", parameters)} == known
        assert tuple(re.findall(r"`(\w+)`", counts)) == envs.load(name, {}).counters


def test_the_guides_environment_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = re.findall(r"```python\n(# my_envs.*?)```", README, flags=re.DOTALL)[0]
    (tmp_path / "my_envs.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    env = envs.load("my_envs.Countdown", {"start": 2})
    step = env.step(env.reset(ASKED, None, 0), "2")
    assert not step.done and step.reward == 0.5
    assert env.step(step.state, "1").done and env.step(step.state, "2").counts == {"wrong": 1}
    sys.modules.pop("my_envs", None)


# --- the tasks ---


@pytest.mark.parametrize("task", tasks.SIZES)
def test_files_are_full_and_the_same_again(task: str, tmp_path: pathlib.Path) -> None:
    first, again, other = (envs.write_task(task, tmp_path / str(n), seed=seed) for n, seed in enumerate((0, 0, 1)))
    for split, size in tasks.SIZES[task].items():
        text = pathlib.Path(first[split]).read_text()
        assert text == pathlib.Path(again[split]).read_text() and len(text.splitlines()) == size
    assert pathlib.Path(first["sft"]).read_text() != pathlib.Path(other["sft"]).read_text()


def replayed(task: str, messages: tuple[Any, ...], reference: dict[str, Any]) -> float:
    """The score of a demonstration in its environment, whose replies are those of the file."""
    env: Any = Calculator(role="user") if task == "calculator" else Guess()
    state, score = env.reset(messages[:1], reference, 0), 0.0
    for at in range(1, len(messages), 2):
        step = env.step(state, messages[at]["content"])
        state, score = step.state, score + step.reward
        assert tuple(messages[at + 1 : at + 2]) == (step.replies if at + 1 < len(messages) else ())
    return score


def test_calculator_demonstrations(tmp_path: pathlib.Path) -> None:
    paths = envs.write_task("calculator", tmp_path, flawed=0.5)
    right, seen = 0, {}
    for split, path in paths.items():
        for record in read_records("demo" if split == "sft" else "prompt", path):
            question = record.messages[0]["content"]
            assert seen.setdefault(question, split) == split  # disjoint by content
            a, b = map(int, re.fullmatch(r"What is (\d\d)\*(\d\d)\?", question).groups())
            if split == "sft":
                score = replayed("calculator", record.messages, {"answer": a * b})
                assert score == (len(record.messages) > 2)  # the flaw is wrong, the call is right
                right += int(score)
            else:
                assert record.reference == {"answer": a * b}
    assert right == tasks.SIZES["calculator"]["sft"] // 2


def test_guess_demonstrations(tmp_path: pathlib.Path) -> None:
    paths = envs.write_task("guess", tmp_path)
    firsts: dict[str, list[bool]] = {}
    for record in read_records("demo", paths["sft"]):
        firsts.setdefault(record.messages[1]["content"], []).append(_found(record.messages))
    assert sorted(firsts) == ["1", "8"] and len(firsts["1"]) == 240
    assert sum(firsts["8"]) == len(firsts["8"]) and sum(firsts["1"]) < 0.4 * len(firsts["1"])  # halving always finds it in four turns
    for split in ("valid", "test"):
        secrets = [record.reference["secret"] for record in read_records("prompt", paths[split])]
        assert sorted(set(secrets)) == list(range(1, 16)) and max(map(secrets.count, range(1, 16))) - min(map(secrets.count, range(1, 16))) == 0
    assert all("secret" not in record.reference for record in read_records("prompt", paths["rl"]))


def _found(messages: tuple[Any, ...]) -> bool:
    """Whether the game was surely won: it ended before its last turn, or the last guess is the only number that fits all replies."""
    told = [(int(said["content"]), reply["content"]) for said, reply in zip(messages[1::2], messages[2::2])]
    fits = [secret for secret in range(1, 16) if all(guess < secret if reply == "higher" else guess > secret for guess, reply in told)]
    assert int(messages[-1]["content"]) in fits and len(messages) <= 2 * tasks.GUESSES
    return len(messages) < 2 * tasks.GUESSES or len(fits) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("gues",), "guess"), (("guess", {"train": 3}), "train"), (("guess", {"sft": 0}), "sft"), (("calculator", {"sft": 9999}), "at most")],
)
def test_tasks_that_cannot_be_written(arguments: tuple[Any, ...], said: str, tmp_path: pathlib.Path) -> None:
    sizes = arguments[1] if len(arguments) > 1 else None
    with pytest.raises(UserError, match=said):
        envs.write_task(arguments[0], tmp_path, sizes=sizes)


def test_sample_files_ship(tmp_path: pathlib.Path) -> None:
    for task in tasks.SIZES:
        written = envs.write_task(task, tmp_path / task, sizes={"sft": 1, "rl": 16, "valid": 1, "test": 1})
        assert pathlib.Path(envs.sample_file(task)).read_text() == pathlib.Path(written["rl"]).read_text()
    with pytest.raises(UserError, match="guess"):
        envs.sample_file("gues")
