"""The terminal table: every line as wide as the next, numbers under their headers, the reward model's row spanning them."""

from __future__ import annotations

import pytest

from rlhf_jax.report.table import task_table, terminal_table
from tests.report import fabricated


@pytest.mark.parametrize("task", ["sort", "a-task-with-a-very-long-name-indeed"])
@pytest.mark.parametrize("seconds", [1.0, 123456.7])
def test_columns_line_up(task, seconds):
    stages = fabricated.results()["tasks"]["sort"]
    stages["ppo"]["seconds"] = stages["rm"]["seconds"] = seconds
    lines = task_table(task, stages).split("\n")
    assert len({len(line) for line in lines}) == 1
    header = lines[0]
    for column in ("gold_greedy", "gold_sample", "win_vs_sft", "95% CI", "seq_kl", "seconds"):
        end = header.index(column) + len(column)
        for line in lines[2:]:
            if not line.startswith("RM") or column == "seconds":
                assert line[end - 1] != " " or (column == "seconds" and line.startswith("  final"))  # right-aligned under its header
                assert end == len(line) or line[end] == " "


def test_values_by_hand():
    table = task_table("sort", fabricated.results()["tasks"]["sort"])
    rows = {line.split("  ")[0]: line for line in table.split("\n")}
    assert rows["DPO"].split() == ["DPO", "0.810", "0.760", "0.730", "[0.690,", "0.770]", "3.00", "27.0"]
    assert rows["SFT"].split() == ["SFT", "0.520", "0.470", "–", "–", "0.00", "20.0"]
    assert rows["RM"].split(maxsplit=1)[1].split("  ")[0] == "accuracy 0.913, length alone 0.562"
    assert rows["RM"].endswith("14.2")


def test_one_table_per_task_and_stages_in_pipeline_order():
    text = terminal_table(fabricated.results())
    first, second = text.split("\n\n")
    assert first.startswith("task: sort") and second.startswith("task: arithmetic")
    names = [line.split("  ")[0] for line in first.split("\n")[2:] if not line.startswith(" ")]
    assert names == ["SFT", "RM", "DPO", "PPO", "GRPO", "GRPO on gold"]


def test_a_reward_model_alone_has_a_table():
    lines = task_table("t", {"rm": {"accuracy": 0.9, "length_baseline": 0.5, "seconds": 3.0}}).split("\n")
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1 and "accuracy 0.900" in lines[2]
