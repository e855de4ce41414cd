import json
import pathlib
import re

import pytest

from rlhf_jax.data.embedded import SIZES, write_task
from rlhf_jax.data.readers import read_records
from rlhf_jax.errors import UserError


def content(task, question):
    if task == "sort":
        digits = re.fullmatch(r"Sort these digits: ((?:\d )+\d)", question).group(1).split()
        assert 3 <= len(digits) <= 6
        return "".join(sorted(digits))
    first, operator, second = re.fullmatch(r"(?:What is|Compute|Calculate) (\d+) ([+-]) (\d+)[?.]", question).groups()
    return operator, *sorted((int(first), int(second)))


def answer(task, question):
    if task == "sort":
        return " ".join(content(task, question))
    first, operator, second = re.search(r"(\d+) ([+-]) (\d+)", question).groups()
    return f"<answer>{int(first) + int(second) if operator == '+' else int(first) - int(second)}</answer>"


def questions(paths, split):
    kind = "demo" if split == "sft" else "prompt"
    return [record.messages[0]["content"] for record in read_records(kind, paths[split])]


@pytest.mark.parametrize("task", ["sort", "arithmetic"])
def test_splits_are_disjoint_by_content_and_full(task, tmp_path):
    paths = write_task(task, tmp_path, seed=1)
    assert {k: pathlib.Path(p).name for k, p in paths.items()} == {
        "sft": "sft.jsonl", "rm": "rm_prompts.jsonl", "rl": "rl_prompts.jsonl", "valid": "valid_prompts.jsonl", "test": "test_prompts.jsonl"
    }
    seen = set()
    for split, size in SIZES[task].items():
        contents = {content(task, question) for question in questions(paths, split)}
        assert len(contents) == len(questions(paths, split)) == size
        assert not seen & contents
        seen |= contents


@pytest.mark.parametrize(("task", "share"), [("sort", 0.6), ("sort", 0.25), ("arithmetic", 0.6), ("arithmetic", 1.0), ("sort", 0.0)])
def test_the_flaw_is_systematic_and_has_its_share(task, share, tmp_path):
    paths = write_task(task, tmp_path, sizes={"sft": 400}, flawed=share)
    wrong = 0
    for record in read_records("demo", paths["sft"]):
        question, said = (message["content"] for message in record.messages)
        right = answer(task, question)
        if said != right:
            wrong += 1
            flaw = right[::-1] if task == "sort" else right.replace("answer>", "result>")
            assert said == flaw
    assert wrong == round(share * 400)


@pytest.mark.parametrize("task", list(SIZES))
def test_a_seed_repeats_and_two_differ(task, tmp_path):
    def files(name, seed):
        return {split: pathlib.Path(path).read_bytes() for split, path in write_task(task, tmp_path / name, seed=seed).items()}

    assert files("a", 0) == files("b", 0) != files("c", 1)
    named = {pathlib.Path(path).name for path in write_task(task, tmp_path / "a").values()}
    assert {path.name for path in (tmp_path / "a").iterdir()} == named


def test_arithmetic_has_both_operators_two_digits_and_several_wordings(tmp_path):
    paths = write_task("arithmetic", tmp_path)
    asked = questions(paths, "test") + questions(paths, "rl")
    assert {content("arithmetic", q)[0] for q in asked} == {"+", "-"}
    assert {q.split()[0] for q in asked} == {"What", "Compute", "Calculate"}
    assert all(re.fullmatch(r"<answer>\d\d</answer>", answer("arithmetic", q)) for q in asked)


def test_the_corpus(tmp_path):
    paths = write_task("lm", tmp_path)
    texts = [record.text for record in read_records("text", paths["text"])]
    assert 10_000 < sum(map(len, texts)) < 25_000 and len(set(texts)) == len(texts)
    assert not set(texts) & {record.text for record in read_records("text", paths["valid"])}
    assert all(json.loads(line).keys() == {"text"} for line in pathlib.Path(paths["text"]).read_text().splitlines())


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("sorts", {}, r"embedded task expected one of .*got 'sorts' \(did you mean 'sort'\?\)"),
        ("sort", {"sizes": {"sft": 9000}}, r"expected at most \d+ rows over all splits .* got \d+; lower some"),
        ("arithmetic", {"sizes": {"test": 0}}, r"size of test expected a positive whole number, got 0"),
        ("arithmetic", {"sizes": {"tests": 3}}, r"expected a split, got 'tests' \(did you mean 'test'\?\)"),
        ("sort", {"flawed": 1.5}, r"flawed expected a share between 0 and 1, got 1.5"),
    ],
)
def test_bad_arguments(task, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_task(task, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
