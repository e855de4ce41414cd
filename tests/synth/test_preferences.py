"""Label frequencies against σ; identical texts; counter-based draws; files without gold, whole or not at all."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rlhf_jax.rewards import gold as golds
from rlhf_jax.synth import preferences
from rlhf_jax.synth.preferences import Samples


def gold(prompt, response):
    return {"best": 1.0, "good": 0.75, "bad": 0.25, "twin": 0.25}[response]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_label_frequency_is_bradley_terry(scale):
    samples = [Samples(i, "q", ["good", "bad"]) for i in range(4000)]
    rows, audit = preferences.label_pairs(samples, gold, scale=scale, pairs_per_prompt=1, seed=0)
    wins = np.mean([row["chosen"] == "good" for row in rows])
    expected = sigmoid(scale * 0.5)
    noise = 4 * (expected * (1 - expected) / 4000) ** 0.5
    assert wins == pytest.approx(expected, abs=noise)
    assert audit.as_dict()["flip_share"] == pytest.approx(1 - wins)
    assert audit.expected_flips == pytest.approx(4000 * (1 - expected))


def test_an_infinite_scale_never_errs_and_ties_are_coins():
    samples = [Samples(i, "q", ["best", "bad", "twin"]) for i in range(800)]
    rows, audit = preferences.label_pairs(samples, gold, scale=math.inf, pairs_per_prompt=3, seed=1)
    assert audit.flips == 0 and audit.expected_flips == 0 and audit.pairs == 2400 and audit.ties == 800
    assert all(gold("q", row["chosen"]) >= gold("q", row["rejected"]) for row in rows)
    coins = [row["chosen"] == "bad" for row in rows if {row["chosen"], row["rejected"]} == {"bad", "twin"}]
    assert np.mean(coins) == pytest.approx(0.5, abs=4 * 0.5 / 800**0.5)


def test_identical_texts_are_skipped_and_counted():
    rows, audit = preferences.label_pairs([Samples(0, "q", ["bad"] * 3)], gold, scale=1.0, pairs_per_prompt=5, seed=0)
    assert rows == [] and (audit.identical, audit.pairs, audit.prompts, audit.prompts_without_pair) == (3, 0, 1, 1)
    rows, audit = preferences.label_pairs([Samples(0, "q", ["bad", "good", "bad"])], gold, scale=1.0, pairs_per_prompt=5, seed=0)
    assert len(rows) == 2 and audit.identical == 1
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_a_prompt_is_labelled_the_same_whatever_stands_beside_it():
    samples = [Samples(i, f"q{i}", ["best", "good", "bad", "twin"]) for i in range(50)]

    def label(some, seed=0):
        rows, _ = preferences.label_pairs(some, gold, scale=2.0, pairs_per_prompt=2, seed=seed)
        return {i: [row for row in rows if row["prompt_id"] == i] for i in range(50)}

    whole, part = label(samples), label(samples[30:10:-3])
    assert all(part[sample.prompt_id] == whole[sample.prompt_id] for sample in samples[30:10:-3])
    assert label(samples) == whole != label(samples, seed=1)
    drawn = {tuple(sorted((row["chosen"], row["rejected"]))) for rows in whole.values() for row in rows}
    assert len(drawn) == 6  # every combination occurs


def test_more_samples_do_not_favour_a_side():
    """The orientation of a pair is random before the label: at scale 0 the earlier sample wins half the time."""
    samples = [Samples(i, "q", ["good", "bad"]) for i in range(2000)]
    rows, _ = preferences.label_pairs(samples, gold, scale=0.0, pairs_per_prompt=1, seed=3)
    assert np.mean([row["chosen"] == "good" for row in rows]) == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5)


def test_clean_pairs_follow_gold_and_skip_ties():
    samples = [Samples(i, "q", ["twin", "bad", "best"]) for i in range(20)]
    rows, audit = preferences.clean_pairs(samples, gold, pairs_per_prompt=3, seed=0)
    assert audit.pairs == len(rows) == 40 and audit.ties == 20 and audit.flips == 0
    assert all(row["chosen"] == "best" for row in rows)


def test_real_gold_labels_the_sort_task():
    prompt = "Sort these digits: 5 3 9 1"
    _, audit = preferences.label_pairs(
        [Samples(i, prompt, ["1 3 5 9", "9 5 3 1"]) for i in range(3000)], golds.sort, scale=3.0, pairs_per_prompt=1, seed=0
    )
    assert audit.as_dict()["flip_share"] == pytest.approx(1 - sigmoid(3.0 * 0.7), abs=0.03)


@pytest.mark.parametrize(
    "call",
    [
        lambda: preferences.label_pairs([], gold, scale=-1.0, pairs_per_prompt=1, seed=0),
        lambda: preferences.label_pairs([], gold, scale=math.nan, pairs_per_prompt=1, seed=0),
        lambda: preferences.label_pairs([], gold, scale=1.0, pairs_per_prompt=0, seed=0),
        lambda: preferences.label_pairs([Samples(0, "q", ["bad"])], gold, scale=1.0, pairs_per_prompt=1, seed=0),
        lambda: preferences.clean_pairs([], gold, pairs_per_prompt=0, seed=0),
    ],
)
def test_refuses(call):
    with pytest.raises(ValueError, match="pairs"):
        call()


def test_files_hold_no_gold_and_are_read_back(tmp_path):
    rows, _ = preferences.label_pairs([Samples(7, "q\n“ü”", ["good", "bad"])], gold, scale=9.0, pairs_per_prompt=1, seed=0)
    path = tmp_path / "new" / "pairs.jsonl"
    assert preferences.write_preferences(path, rows) == 1
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"prompt": "q\n“ü”", "chosen": "good", "rejected": "bad", "prompt_id": 7}
    assert "0.75" not in line and "gold" not in line


def test_the_data_room_reads_what_is_written(tmp_path):
    readers = pytest.importorskip("rlhf_jax.data.readers")
    rows, _ = preferences.label_pairs([Samples(i, "q", ["good", "bad"]) for i in range(3)], gold, scale=9.0, pairs_per_prompt=1, seed=0)
    path = tmp_path / "pairs.jsonl"
    preferences.write_preferences(path, rows)
    records = list(readers.read_records("preference", path))
    assert [record.chosen[0]["content"] for record in records] == [row["chosen"] for row in rows]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("old\n")

    def broken():
        yield {"prompt": "q", "chosen": "a", "rejected": "b"}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        preferences.write_preferences(path, broken())
    for bad in ({"prompt": "q", "chosen": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_gold": 1.0}):
        with pytest.raises(ValueError, match="row 1"):
            preferences.write_preferences(path, [bad])
    assert path.read_text() == "old\n" and [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]
