"""`rlhf-jax sample`: filters, stop strings, rows that make room for others, the best of several; and every mistake in saying so."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.eval import models
from tests.cli.conftest import Command
from tests.cli.saved import config, write_run
from tests.train.runs import rows

LETTERS = Tokenizer.byte_level().encode("abc")[0].tolist()
FREE = ["--max_new_tokens=6", "--seed=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_run(tmp_path_factory.mktemp("saved") / "policy", config())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Eleven prompts of 2 to 12 letters."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q" + "x" * n}) + "\n" for n in range(1, 12)))
    return path


def sampled(command: Command, run: pathlib.Path, prompts: pathlib.Path, folder: pathlib.Path, *flags: str) -> list[dict[str, Any]]:
    done = command("sample", f"--checkpoint={run}", f"--input={prompts}", f"--output={folder / 'out.jsonl'}", *FREE, *flags)
    assert done.code == 0, done.err
    return rows(folder / "out.jsonl")


def test_filters_in_both_forms_and_stop_strings(command: Command, run: pathlib.Path, prompts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    flags = ["--filters=" + json.dumps([{"name": "allowed", "ids": LETTERS}]), "--filters=min_new_tokens:tokens=2", "--stop_strings=ab", "--n=4"]
    found = sampled(command, run, prompts, tmp_path, *flags)
    texts = [row["response"] for row in found]
    assert len(texts) == 44 and set("".join(texts)) == set("abc") and any(not row["truncated"] for row in found)
    for row in found:
        assert row["truncated"] == (len(row["response"]) == 6 and not row["response"].endswith("ab"))
        assert len(row["response"]) > 2 and "ab" not in row["response"][:-1].removesuffix("a")


def test_rows_that_make_room_for_others_say_the_same_in_one_program(command: Command, run: pathlib.Path, prompts: pathlib.Path,
                                                                    tmp_path: pathlib.Path) -> None:
    """Four rows at once of twenty-two, a power of two of prompt slots for all lengths: one compilation a setting."""
    models._generate.cache_clear()
    many, few = (sampled(command, run, prompts, tmp_path, "--n=2", f"--batch_size={size}") for size in (64, 4))
    assert many == few and len(many) == 22
    assert models._generate.cache_info().currsize == 2


def test_no_more_rows_at_once_than_asked_for(command: Command, run: pathlib.Path, prompts: pathlib.Path, tmp_path: pathlib.Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Six samples of a prompt in four rows: three of them share a prefill, and three rows decode at once."""
    seen: list[tuple[int, int]] = []
    original = models.Policy.generate
    monkeypatch.setattr(models.Policy, "generate", lambda self, *a, **k: seen.append((k["group_size"], k["slots"])) or original(self, *a, **k))
    found = sampled(command, run, prompts, tmp_path, "--n=6", "--batch_size=4")
    assert set(seen) == {(3, 3)} and [(row["prompt_id"], row["sample_id"]) for row in found] == [(p, s) for p in range(11) for s in range(6)]


def test_the_best_of_several_by_a_function_and_by_a_reward_model(command: Command, run: pathlib.Path, prompts: pathlib.Path,
                                                                 tmp_path: pathlib.Path) -> None:
    every = sampled(command, run, prompts, tmp_path, "--n=4", "--filters=allowed:ids=" + json.dumps([*LETTERS, *Tokenizer.byte_level().stop_ids]))
    reward = write_run(tmp_path / "reward", config("reward"))
    for name in ("rules.brevity", str(reward)):
        best = sampled(command, run, prompts, tmp_path, "--best_of=4", f"--reward={name}",
                       "--filters=allowed:ids=" + json.dumps([*LETTERS, *Tokenizer.byte_level().stop_ids]))
        assert len(best) == 11
        for number, row in enumerate(best):
            chosen = row["scores"].index(max(row["scores"]))
            assert len(row["scores"]) == 4 and row["score"] == row["scores"][chosen] and row["sample_id"] == chosen
            assert {**row} == {**every[4 * number + chosen], "score": row["score"], "scores": row["scores"]}
        assert len({row["sample_id"] for row in best}) > 1
    done = command("sample", f"--checkpoint={run}", "--prompt=q", *FREE, "--best_of=4", "--reward=rules.brevity")
    assert done.code == 0 and f"best of 4: at most {math.log(4) - 0.75:.3f} nats" in done.err


@pytest.mark.parametrize(("flags", "said"), [
    (["--filters=min_p"], "write name:key=value"),
    (["--filters=[{"], "is no JSON"),
    (["--filters=min_q:p=0.1"], "--filters[0].name = 'min_q' is not a filter"),
    (["--filters=min_p:p=2"], "--filters[0].p = 2: must be a number from 0"),
    (["--filters=temperature:t=2"], "set --temperature"),
    (["--filters=min_new_tokens:tokens=3"], "--filters[0].tokens = 3 exceeds --max_new_tokens = 2"),
    (["--temperature=1e-39"], "--temperature = 1e-39: must be finite and at least 1e-06, or 0"),
    (["--temperature=inf"], "--temperature = inf"),
    (["--stop_strings=<|end|>"], "--stop_strings has '<|end|>', a control token"),
    (["--best_of=4"], "--best_of and --reward go together"),
    (["--reward=rules.brevity"], "--best_of and --reward go together"),
    (["--best_of=4", "--n=2", "--reward=rules.brevity"], "--n = 2 and --best_of = 4: give one of them"),
    (["--best_of=2", "--reward=rules.brevty"], "brevity"),
    (["--best_of=2", "--reward=nowhere/run"], "nowhere/run"),
])
def test_a_mistake_is_one_sentence(command: Command, run: pathlib.Path, flags: list[str], said: str) -> None:
    done = command("sample", f"--checkpoint={run}", "--prompt=q", "--max_new_tokens=2", *flags)
    assert done.code == 2 and said in done.err and len(done.err.strip().splitlines()) == 1, done.err
