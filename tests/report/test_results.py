"""The schema takes what the pipeline writes and names the key of everything else."""

from __future__ import annotations

import copy
import json
import math

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.report import results as schema
from tests.report import fabricated


def test_a_full_document_survives_the_disk(tmp_path):
    document = fabricated.results()
    schema.write_results(document, tmp_path / "runs" / "results.json")
    assert schema.read_results(tmp_path / "runs" / "results.json") == document


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("tasks",), {}, "tasks is empty"),
        (("tasks", "sort", "dpo", "gold_greedy"), 1.2, r"tasks\.sort\.dpo\.gold_greedy is 1\.2"),
        (("tasks", "sort", "dpo", "gold_greedy"), math.nan, "gold_greedy is nan"),
        (("tasks", "sort", "dpo", "gold_greedy"), True, "gold_greedy is True"),
        (("tasks", "sort", "dpo", "win_ci95"), [0.7, 0.6], r"win_ci95 is \[0\.7, 0\.6\]"),
        (("tasks", "sort", "dpo", "win_ci95"), [0.7], r"expected \[low, high\]"),
        (("tasks", "sort", "dpo", "win_ci95"), None, r"win_ci95 is None"),
        (("tasks", "sort", "dpo", "win_vs_sft"), None, r"win_vs_sft is None"),
        (("tasks", "sort", "dpo", "seq_kl"), math.inf, "seq_kl is inf"),
        (("tasks", "sort", "dpo", "seconds"), -1, "seconds is -1"),
        (("tasks", "sort", "dpo", "final", "gold_sample"), "x", r"dpo\.final\.gold_sample is 'x'"),
        (("tasks", "sort", "rm", "length_baseline"), 2, r"rm\.length_baseline is 2"),
        (("tasks", "sort", "grppo"), {}, r"grppo is not a stage \(did you mean 'grpo'\?\)"),
        (("tasks", "sort", "samples"), {}, "samples is {}; expected a list"),
        (("tasks", "sort", "samples", 1, "dpo", "response"), 3, r"samples\[1\]\.dpo\.response is 3"),
        (("tasks", "sort", "samples", 1, "rm"), {}, "rm is not a stage that responds"),
        (("versions", "jax"), 0.1, r"versions\.jax is 0\.1"),
        (("configs", "sort/sft"), 3, "configs.sort/sft is 3"),
        (("extra",), math.nan, "not plain JSON"),
    ],
)
def test_every_wrong_value_is_named(path, value, named):
    document = fabricated.results()
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UserError, match=named):
        schema.validate(document)


@pytest.mark.parametrize("key", ["gold_greedy", "gold_sample", "win_vs_sft", "win_ci95", "seq_kl", "seconds"])
def test_every_required_key_is_missed(key):
    document = fabricated.results()
    del document["tasks"]["arithmetic"]["ppo"][key]
    with pytest.raises(UserError, match=rf"tasks\.arithmetic\.ppo lacks '{key}'"):
        schema.validate(document)


def test_sft_may_lack_a_win_rate_against_itself():
    document = fabricated.results()
    document["tasks"]["sort"]["sft"] |= {"win_vs_sft": 0.5, "win_ci95": [0.5, 0.5]}
    schema.validate(document)


def test_nothing_is_written_of_a_bad_document(tmp_path):
    document = copy.deepcopy(fabricated.results())
    document["tasks"]["sort"]["dpo"]["seq_kl"] = None
    with pytest.raises(UserError):
        schema.write_results(document, tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        schema.read_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        schema.read_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text(json.dumps({"tasks": []}))
    with pytest.raises(UserError, match="tasks is"):
        schema.read_results(tmp_path / "results.json")
