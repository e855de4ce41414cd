"""Gold values worked out by hand from the docstrings' formulas."""

from __future__ import annotations

import ast
import inspect
import itertools

import pytest

from rlhf_jax.rewards import gold

SORT = "Sort these digits: 5 3 9 1"
SUM = "What is 7 + 5?"


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("1 3 5 9", 1.0),
        ("9 5 3 1", 0.3),  # every digit, no pair in order
        ("1 5 3 9", 0.3 + 0.5 * 5 / 6),  # one of six pairs the wrong way round
        ("1 3", 0.5 * (0.3 + 0.5 / 6)),  # half the digits, one pair of six
        ("1 3 5 9 1 3 5 9", 0.5 * 0.8),  # repetition: overlap 4/8
        ("1 3 5 9 and more", 4 / 6 * 0.8),
        ("1 3 5 8", 0.75 * (0.3 + 0.5 * 3 / 6)),  # an invented digit
        ("1 1 1 1", 0.25 * 0.3),
        ("", 0.0),
        ("hello there", 0.0),
        ("1359", 0.0),
    ],
)
def test_sort_by_hand(response, value):
    assert gold.sort(SORT, response) == pytest.approx(value)


def test_sort_ignores_the_order_of_equal_digits():
    assert gold.sort("Sort these digits: 4 4 2", "2 4 4") == 1.0
    assert gold.sort("Sort these digits: 4 4 2", "4 4 2") == pytest.approx(0.3)
    assert gold.sort("Sort these digits: 7 7", "7 7") == 1.0
    assert gold.sort("Sort these digits: 7", "7") == 1.0


def test_sort_is_one_only_for_the_answer_and_in_the_unit_interval():
    for words in itertools.chain.from_iterable(itertools.product("1359x", repeat=n) for n in range(5)):
        value = gold.sort(SORT, " ".join(words))
        assert 0.0 <= value <= 1.0
        assert (value == 1.0) == (words == ("1", "3", "5", "9"))


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<answer>12</answer>", 1.0),
        (" <answer> 12 </answer>\n", 1.0),
        ("<answer>13</answer>", 0.4),
        ("<result>12</result>", 0.3),
        ("<result>13</result>", 0.0),
        ("12", 0.3),
        ("<answer>12", 0.3),
        ("It is <answer>12</answer>.", 0.2 + 0.3 + 0.15),
        ("7 + 5 = <answer>12</answer>", 0.65),  # the tag says which number is the answer
        ("<answer>12</answer><answer>12</answer>", 0.0),  # two answers are none
        ("<answer>12</answer><answer>", 0.3),
        ("11 or 12", 0.0),
        ("<answer>twelve</answer>", 0.0),
        ("<answer>-12</answer>", 0.4),
        ("", 0.0),
        ("9" * 10_000, 0.0),
        ("<answer>" + "9" * 10_000 + "</answer>", 0.0),
    ],
)
def test_arithmetic_by_hand(response, value):
    assert gold.arithmetic(SUM, response) == pytest.approx(value)


@pytest.mark.parametrize(
    ("prompt", "answer"), [("What is 3 - 8?", -5), ("What is 6 * 7?", 42), ("What is 6 × 7?", 42), ("What is -2 + 2?", 0)]
)
def test_arithmetic_operators(prompt, answer):
    assert gold.arithmetic(prompt, f"<answer>{answer}</answer>") == 1.0
    assert gold.arithmetic(prompt, f"<answer>{answer + 1}</answer>") == pytest.approx(0.4)


def test_both_parts_of_arithmetic_can_be_learnt_from_pairs():
    """Each part moves the gold whatever the other one is."""
    value = {(tag, n): gold.arithmetic(SUM, f"<{tag}>{n}</{tag}>") for tag in ("answer", "result") for n in (12, 13)}
    for tag in ("answer", "result"):
        assert value[tag, 12] - value[tag, 13] >= 0.3 - 1e-9
    for n in (12, 13):
        assert value["answer", n] - value["result", n] >= 0.3 - 1e-9


@pytest.mark.parametrize("task", ["sort", "arithmetic"])
@pytest.mark.parametrize(
    "prompt", ["", "Sort these letters: a b", "What is love?", "Please: Sort these digits: 1 2", "What is 1 + 2? What is 1 + 2?"]
)
def test_a_foreign_prompt_is_an_error(task, prompt):
    with pytest.raises(ValueError, match="is not of the form"):
        gold.GOLD[task](prompt, "1 2")


def test_gold_imports_nothing_of_the_package():
    tree = ast.parse(inspect.getsource(gold))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert "re" in modules and not any(str(module).startswith("rlhf_jax") for module in modules)
