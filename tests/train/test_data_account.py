"""What became of the data's rows is written and said, and a run goes on with the rows that it began with only."""

import json
import pathlib

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.train.loop import train
from tests.train.runs import snapshot, tiny, write_rows

DEMOS = [{"prompt": f"Say {i}.", "response": str(i) * (60 if i == 3 else 2)} for i in range(8)]


def test_rows_are_accounted_for_and_changed_data_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    path = write_rows(tmp_path / "demos.jsonl", DEMOS)
    config = tiny("sft", {"data.train": path, "data.overlong": "truncate", "data.max_length": 40, "data.pack": False, "run.steps": 2})
    train(config, str(tmp_path / "run"))
    assert "config.data.train: 8 rows read, 8 kept, 1 truncated, 0 skipped" in capsys.readouterr().out
    account = json.loads((tmp_path / "run" / "data.json").read_text())["train"]
    assert (account["read"], account["kept"], account["truncated"]) == (8, 8, 1)
    before = snapshot(tmp_path / "run")
    write_rows(tmp_path / "demos.jsonl", DEMOS[1:])
    with pytest.raises(UserError, match=r"config\.data\.train.*its content changed"):
        train(config, str(tmp_path / "run"))
    assert snapshot(tmp_path / "run") == before
    write_rows(tmp_path / "demos.jsonl", DEMOS)
    assert train(config, str(tmp_path / "run")).step == 2


def test_a_skipped_row_is_counted(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    path = write_rows(tmp_path / "demos.jsonl", DEMOS)
    train(tiny("sft", {"data.train": path, "data.overlong": "skip", "data.max_length": 40, "run.steps": 1}), str(tmp_path / "run"))
    assert "7 kept, 0 truncated, 1 skipped" in capsys.readouterr().out


def test_verdicts_on_steps_beyond_the_context_are_counted(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    """Row 0 keeps the first of its three steps, row 1 both, and row 2, which keeps none, is left out."""
    steps = [["one", "2" * 30, "three"], ["one", "two"], ["1" * 60]]
    path = write_rows(tmp_path / "steps.jsonl", [{"prompt": "Go.", "completions": each, "labels": [True] * len(each)} for each in steps])
    changes = {"data.train": path, "data.overlong": "truncate", "data.max_length": 30, "run.steps": 1, "validation.every": 0}
    train(tiny("process_reward", changes), str(tmp_path / "run"))
    account = json.loads((tmp_path / "run" / "data.json").read_text())["train"]
    assert (account["steps"], account["steps_cut"], account["truncated"]) == (3, 3, 1)
    assert "3 rows read, 2 kept, 1 truncated, 1 skipped" in (said := capsys.readouterr().out) and "3 verdicts on steps cut off" in said


def test_a_reward_model_with_a_shorter_context_is_refused(tmp_path: pathlib.Path) -> None:
    train(tiny("reward", {"run.steps": 1, "model.context": 64}), str(tmp_path / "rm"))
    changes = {"reward_fn": "", "reward_from": str(tmp_path / "rm"), "data.prompt_length": 60}
    with pytest.raises(UserError, match=r"exceeds the context of 64"):
        train(tiny("ppo", changes), str(tmp_path / "ppo"))
    assert not (tmp_path / "ppo").exists()
