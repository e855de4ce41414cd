"""The page is one file, shows what the results say, and shows model output as text."""

from __future__ import annotations

import base64
import html
import html.parser
import json
import re
import xml.etree.ElementTree

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.report import curves, samples
from rlhf_jax.report.page import headline, render, write_report
from tests.report import fabricated

HOSTILE = """<script>alert("1")</script><img src=x onerror='a()'>&amp;"""


class Elements(html.parser.HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = {f"{task}/{stage}": fabricated.write_metrics(folder / task / stage, stage, 60) for task in ("sort",) for stage in ("sft", "ppo")}
    path = folder / "out" / "report.html"
    write_report(fabricated.results(HOSTILE), runs, path)
    return path.read_text(encoding="utf-8")


def test_model_output_is_text(page):
    elements = Elements(page)
    assert not any(tag == "script" or "onerror" in attrs for tag, attrs in elements.tags)
    assert HOSTILE in elements.text  # parsed back, it is exactly what the model said
    assert "<script" not in page and html.escape("<script>") in page


@pytest.mark.parametrize("place", ["prompt", "config", "version", "task"])
def test_every_other_text_is_escaped_too(place):
    results = fabricated.results()
    if place == "prompt":
        results["tasks"]["sort"]["samples"][0]["prompt"] = HOSTILE
    elif place == "task":
        results["tasks"][HOSTILE] = results["tasks"].pop("sort")
    else:
        results[f"{place}s"][HOSTILE] = HOSTILE
    elements = Elements(render(results, {}))
    assert not any(tag == "script" or "onerror" in attrs for tag, attrs in elements.tags)
    assert any(HOSTILE in text for text in elements.text)


def test_the_page_refers_to_nothing_outside_itself(page):
    for tag, attrs in Elements(page).tags:
        assert tag not in ("link", "iframe", "object", "script")
        for name in ("src", "href", "data", "poster", "srcset"):
            assert attrs.get(name) is None or attrs[name].startswith("data:image/svg+xml;base64,")
    assert "http" not in page and "@import" not in page and "url(" not in page


def test_pictures_are_whole_and_described(page):
    images = [attrs for tag, attrs in Elements(page).tags if tag == "img"]
    assert len(images) == 4  # gold, wins, frontier and the one task with runs
    for image in images:
        assert len(image["alt"]) > 10
        svg = base64.b64decode(image["src"].split(",", 1)[1])
        assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")


def test_table_samples_configs_and_versions_are_there(page):
    text = " ".join(" ".join(Elements(page).text).split())
    parts = ("0.810", "0.690 – 0.770", "0.913", "length alone on 0.562", "GRPO on gold", "optax", "0.2.8", '"lr": 0.001', "beta: 0.1")
    for part in parts:
        assert part in text, part
    assert page.count('<tr class="final">') == 8 and page.count("<details>") == 2


def test_headline_says_no_more_than_the_intervals():
    stages = {
        "sft": fabricated.policy(0.5, None, 0.0, 1.0),
        "dpo": {**fabricated.policy(0.8, 0.7, 2.0, 1.0)},
        "ppo": {**fabricated.policy(0.55, 0.52, 2.0, 1.0), "win_ci95": [0.48, 0.56]},
        "grpo": {**fabricated.policy(0.3, 0.4, 2.0, 1.0), "win_ci95": [0.36, 0.44]},
    }
    assert headline("sort", stages) == (
        "DPO beats SFT on held-out prompts (win rate 70 %); PPO is not told apart from SFT (48–56 % wins); "
        "GRPO loses to SFT (36–44 % wins); sampled gold rises from 0.45 to 0.75 with DPO."
    )
    full = headline("sort", fabricated.results()["tasks"]["sort"])
    assert full.startswith("DPO, PPO and GRPO each beat SFT on held-out prompts (win rates 73 %, 78 % and 82 %); ")
    assert full.endswith("with GRPO; trained on the verifiable gold itself, GRPO reaches 0.92.")
    assert headline("t", {"rm": {"accuracy": 0.9}}) == "The reward model agrees with gold on 90 % of pairs."
    assert headline("t", {"sft": stages["sft"]}) == "SFT reaches a gold of 0.45."


@pytest.mark.parametrize("stage", ["rm", "sft", "dpo"])
def test_one_stage_alone_has_a_page(stage):
    results = fabricated.results()
    results["tasks"] = {"sort": {stage: results["tasks"]["sort"][stage]}}
    text = " ".join(Elements(render(results, {})).text)
    assert "Results" in text and ("Win rate against" in text) == (stage == "dpo") and ("Gold per stage" in text) == (stage != "rm")


def test_bad_input_writes_nothing(tmp_path):
    results = fabricated.results()
    results["tasks"]["sort"]["dpo"].pop("seq_kl")
    with pytest.raises(UserError):
        write_report(results, {}, tmp_path / "report.html")
    for name in ("sft", "other/sft", "sort/nothing"):
        with pytest.raises(ValueError, match="report: run"):
            write_report(fabricated.results(), {name: tmp_path}, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_deterministic(tmp_path):
    pages = [render(fabricated.results(), {}) for _ in range(2)]
    assert pages[0] == pages[1] and not re.search(r"20\d\d-\d\d-\d\d", pages[0])


def test_metrics_are_read_as_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert curves.read_series(path) == {}
    path.write_text('{"step": 1, "loss/sft": 2.5, "note": "x"}\n{"step": 2, "loss/sft": NaN, "valid/loss": 1}\n{"step": 3, "loss')
    series = curves.read_series(path)
    assert series["loss/sft"][0].tolist() == [1, 2] and series["loss/sft"][1][0] == 2.5
    assert [part.tolist() for part in series["valid/loss"]] == [[2], [1]] and set(series) == {"loss/sft", "valid/loss"}
    path.write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2"):
        curves.read_series(path)


def test_a_story_prefers_what_matters_and_repeats_nothing():
    names = ["loss/policy", "objective/kl", "objective/score", "objective/score_std", "objective/entropy", "eval/objective/score", "optimizer/lr"]
    assert curves.story("ppo", dict.fromkeys(names)) == ["objective/score", "objective/kl", "objective/entropy", "eval/objective/score"]
    assert curves.story("sft", dict.fromkeys(["optimizer/lr", "loss/nll", "eval/loss/nll"])) == ["loss/nll", "eval/loss/nll", "optimizer/lr"]
    assert curves.story("dpo", {}) == []


def test_running_mean_by_hand_and_over_gaps():
    assert curves._running_mean([1.0, 2.0, 3.0], 3) == pytest.approx([1.5, 2.0, 2.5])
    assert curves._running_mean([1.0, float("nan"), 3.0], 3) == pytest.approx([1.0, 2.0, 3.0])


def said(step: int, response: str, **more) -> dict:
    return {"step": step, "prompt_id": 0, "messages": [{"role": "user", "content": HOSTILE}], "ended": True, "response": response, **more}


def write_samples(workdir, lines) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "samples.jsonl").write_bytes("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode() + b'{"step": 9, "mes')


def test_what_was_sampled_is_a_table_of_the_last_steps(tmp_path):
    lines = [said(step, f"answer {step}.{row}", score=0.5) for step in range(1, 7) for row in range(2)]
    lines += [said(7, HOSTILE, score=None, rewards={"math": None, "form": 0.25}, failed={"math": f"raised {HOSTILE}"})]
    lines += [{**said(7, "x"), "messages": None}]
    lines += [{**said(8, "two\nturns\u2028here", score=-1.5, rewards={"math": 1.0, "form": 0.0}), "ended": False,
               "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]}]
    write_samples(tmp_path / "ppo", lines)
    found = samples.sampled(tmp_path / "ppo")
    assert [row["step"] for row in found["rows"]] == [6, 6, 7, 8] and found["labels"] == ["form", "math"] and found["left_out"] == 0
    assert found["rows"][-1]["prompt"] == "system: Be brief.\nuser: Why?"
    results = fabricated.results()
    page = render(results, {"sort/ppo": tmp_path / "ppo"})
    elements = Elements(page)
    assert not any(tag == "script" or "onerror" in attrs for tag, attrs in elements.tags) and HOSTILE in elements.text
    assert f"raised {HOSTILE}" in elements.text and "-1.500" in elements.text and "0.250" in elements.text and "answer 5" not in page
    assert "Sampled while training" in page and "Sampled while training" not in render(results, {})


def test_the_table_is_bounded_whatever_the_file_holds(tmp_path):
    write_samples(tmp_path, [said(1, "a" * 100_000, score=1.0, failed={"math": "b" * 9_000}) for _ in range(50)])
    found = samples.sampled(tmp_path)
    assert len(found["rows"]) == 6 and found["left_out"] == 44
    assert all(len(row["response"]) < 1300 and len(row["failed"]["math"]) < 1300 for row in found["rows"])
    assert "98800 characters" in found["rows"][0]["response"]
    assert samples.sampled(tmp_path / "nothing") is None
    (tmp_path / "samples.jsonl").write_text("")
    assert samples.sampled(tmp_path) is None
