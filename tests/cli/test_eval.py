"""`rlhf-jax eval` in this process: the best of several, the cache's precision, another template, and what is refused before anything is generated."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest

from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.eval import models
from rlhf_jax.eval.models import Policy
from rlhf_jax.rewards import gold
from tests.cli.conftest import Command
from tests.cli.saved import config, write_run

SHORT = ["--max_new_tokens=4", "--batch_size=8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("saved")
    write_run(folder / "policy", config())
    write_run(folder / "other", config(), seed=1)
    write_run(folder / "reward", config("reward"))
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Sort these digits: {n} 3 9"}) + "\n" for n in range(5)))
    return path


def evaluated(command: Command, runs: pathlib.Path, prompts: pathlib.Path, *flags: str) -> dict[str, Any]:
    output = prompts.with_name("row.json")
    done = command("eval", f"--checkpoint={runs / 'policy'}", f"--data={prompts}", f"--output={output}", *SHORT, *flags)
    assert done.code == 0, done.err
    row: dict[str, Any] = json.loads(output.read_text())
    return row


def test_the_best_of_several(command: Command, runs: pathlib.Path, prompts: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen by what they are judged by, the best are the best of each prompt; the rest of the row stays as it is."""
    monkeypatch.setitem(gold.GOLD, "sort", lambda prompt, response: 1 / (1 + len(response) / 16))
    judged = ["--gold=sort", f"--baseline={runs / 'other'}"]
    plain = evaluated(command, runs, prompts, *judged, "--samples=3")
    row = evaluated(command, runs, prompts, *judged, "--best_of=3", "--reward=rules.brevity")
    assert {name: row[name] for name in plain} == plain and "seq_kl" in plain
    assert row["gold_best"] > row["gold_sample"] and row["win_best_vs_baseline"] > row["win_vs_baseline"] and row["best_of"] == 3
    assert row["kl_bound"] == pytest.approx(math.log(3) - 2 / 3) and row["gold_best_ci95"][0] < row["gold_best"] < row["gold_best_ci95"][1]
    alone = evaluated(command, runs, prompts, "--gold=sort", "--best_of=3", "--reward=rules.brevity")
    assert alone["gold_best"] == row["gold_best"] and "seq_kl" not in alone and "win_best_vs_baseline" not in alone


def test_the_caches_precision_and_another_template(command: Command, runs: pathlib.Path, prompts: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                                   tmp_path: pathlib.Path) -> None:
    seen: list[tuple[str, int]] = []
    original = Policy.generate
    note = lambda self, batch, **how: seen.append((how["cache"], batch.tokens.shape[1])) or original(self, batch, **how)  # noqa: E731
    monkeypatch.setattr(Policy, "generate", note)
    (tmp_path / "long.jinja").write_text("x" * 40 + ChatTemplate.load("plain").source)
    (runs / "policy" / "template.jinja").rename(tmp_path / "kept.jinja")
    try:
        refused = command("eval", f"--checkpoint={runs / 'policy'}", f"--data={prompts}", "--gold=sort", *SHORT)
        assert refused.code == 2 and "--checkpoint" in refused.err and "name one with --template" in refused.err
        evaluated(command, runs, prompts, "--gold=sort", "--samples=2", "--cache=int8", f"--template={tmp_path / 'long.jinja'}")
    finally:
        (tmp_path / "kept.jinja").rename(runs / "policy" / "template.jinja")
    assert [kind for kind, _ in seen] == ["int8", "int8"] and all(width >= 64 for _, width in seen)


def test_sample_takes_them_too(command: Command, runs: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models._generate.cache_clear()
    for flags in ([], ["--cache=int8"], ["--template=lines"]):
        done = command("sample", f"--checkpoint={runs / 'policy'}", "--prompt=q", "--max_new_tokens=4", *flags)
        assert done.code == 0, done.err
    assert models._generate.cache_info().currsize == 3  # another template has another end of a turn


@pytest.mark.parametrize(("flags", "said"), [
    (["--best_of=2"], "--best_of and --reward go together"),
    (["--best_of=2", "--reward=rules.brevity", "--samples=4"], "--samples = 4 and --best_of = 2: give one of them"),
    (["--best_of=2", "--reward=rules.brevty"], "brevity"),
    (["--best_of=2", "--reward=nowhere/run"], "nowhere/run"),
    (["--temperature=0"], "--temperature = 0.0: must be finite and at least 1e-06"),
    (["--template=plan"], "--template = 'plan'"),
    (["--cache=int4"], "--cache"),
    (["--gold=arithmetic"], "--gold = 'arithmetic' does not fit --data"),
])
def test_a_mistake_is_one_sentence_before_anything_is_generated(
    command: Command, runs: pathlib.Path, prompts: pathlib.Path, flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "generate", lambda *_, **__: pytest.fail("generated"))
    judged = [] if any(flag.startswith("--gold") for flag in flags) else ["--gold=sort"]
    done = command("eval", f"--checkpoint={runs / 'policy'}", f"--data={prompts}", *SHORT, *judged, *flags)
    assert done.code == 2 and said in done.err and len(done.err.strip().splitlines()) == 1, done.err


def test_a_reward_model_takes_no_flag_of_a_policys(command: Command, runs: pathlib.Path, prompts: pathlib.Path) -> None:
    done = command("eval", f"--checkpoint={runs / 'reward'}", f"--data={prompts}", "--gold=sort")
    assert done.code == 2 and "--gold = 'sort'" in done.err and "reward model" in done.err
