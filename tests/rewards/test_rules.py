"""Every rule against values worked out by hand, its failures, and parameters that it refuses on no rows."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_jax.rewards import rules
from rlhf_jax.rewards.host import Failed

EIGHT = {"answer": "8"}
CASES: list[tuple[str, dict[str, Any], str, Any, float]] = [
    ("exact_match", {}, " 8\n", EIGHT, 1.0),
    ("exact_match", {}, "8.0", EIGHT, 0.0),
    ("exact_match", {}, "Yes", {"answer": "yes"}, 0.0),
    ("exact_match", {"ignore_case": True}, "Yes", {"answer": "yes"}, 1.0),
    ("exact_match", {"extract": "tag"}, "so <answer>8</answer>", EIGHT, 1.0),
    ("exact_match", {"extract": "tag"}, "8", EIGHT, 0.0),
    ("exact_match", {"field": "gold"}, "8", {"gold": 8}, 1.0),
    ("numeric", {}, "8", EIGHT, 1.0),
    ("numeric", {}, "I think\nit is 8.0", EIGHT, 1.0),
    ("numeric", {}, "1,234", {"answer": 1234}, 1.0),
    ("numeric", {}, "3/4", {"answer": 0.75}, 1.0),
    ("numeric", {}, "75%", {"answer": 0.75}, 1.0),
    ("numeric", {}, "75%", {"answer": 75}, 0.0),
    ("numeric", {"percent": "ignore"}, "75%", {"answer": 75}, 1.0),
    ("numeric", {}, "1000.0005", {"answer": 1000}, 1.0),
    ("numeric", {}, "1000.01", {"answer": 1000}, 0.0),
    ("numeric", {"tolerance": 0.01}, "1009", {"answer": 1000}, 1.0),
    ("numeric", {"tolerance": 0.0}, "0.3333333", {"answer": "1/3"}, 0.0),
    ("numeric", {}, "7 + 1", {"answer": 8}, 0.0),  # "auto" takes the text of one line whole, and it is not worked out
    ("numeric", {}, "18", {"answer": "She sells 9 * 2.\n#### 18"}, 1.0),
    ("numeric", {}, "none", EIGHT, 0.0),
    ("numeric", {}, "So the answer is 8 dollars.", EIGHT, 1.0),
    ("numeric", {}, "The answer is 8 eggs", EIGHT, 1.0),
    ("numeric", {}, "#### 8 dollars", EIGHT, 1.0),
    ("numeric", {}, "<answer>8 eggs</answer>", EIGHT, 1.0),
    ("numeric", {}, "It is 8 kg", EIGHT, 1.0),
    ("numeric", {}, "She makes 4*2 = $8 every day.", EIGHT, 1.0),
    ("numeric", {}, "8 of 9 eggs", EIGHT, 0.0),
    ("numeric", {}, "0 + 8", EIGHT, 0.0),  # a sum left to do, though it ends in the answer
    ("numeric", {}, "<answer>no eggs</answer> 8", EIGHT, 0.0),
    ("numeric", {"extract": "whole"}, "8 eggs", EIGHT, 0.0),
    ("numeric", {"percent": "ignore"}, "8% of all", EIGHT, 1.0),
    ("math", {}, r"So \boxed{\frac{16}{2}}", {"answer": "8.0"}, 0.0),
    ("math", {}, r"So \boxed{\frac{3}{6}}", {"answer": r"thus $\boxed{\frac12}$"}, 1.0),
    ("math", {}, r"\boxed{\{2,1\}}", {"answer": r"\{1,2\}"}, 1.0),
    ("math", {"extract": "boxed"}, "8", EIGHT, 0.0),
    ("regex", {"pattern": r"\d+"}, "at 10", None, 1.0),
    ("regex", {"pattern": r"\d+", "whole": True}, "at 10", None, 0.0),
    ("regex", {"pattern": "a.b", "whole": True}, "a\nb", None, 1.0),
    ("regex", {}, "at 10", {"pattern": "^at"}, 1.0),
    ("regex", {}, "at 10", {"pattern": "^10"}, 0.0),
    ("format", {}, "<think>a</think>\n<answer>b</answer>", None, 1.0),
    ("format", {}, "<think>a</think> so <answer>b</answer>", None, 0.0),
    ("format", {}, "<answer>b</answer><think>a</think>", None, 0.0),
    ("format", {}, "<think> </think><answer>b</answer>", None, 0.0),
    ("format", {}, "<think>a</think><answer>b</answer><answer>c</answer>", None, 0.0),
    ("format", {}, "<think>a<answer>b</think></answer>", None, 0.0),
    ("format", {"partial": True}, "<think>a</think> b", None, 0.25),
    ("format", {"partial": True}, "<answer>b</answer><think>a</think>", None, 0.5),
    ("format", {"tags": ("sql",)}, "<sql>select 1</sql>", None, 1.0),
    ("length", {"low": 2, "high": 4}, "abc", None, 1.0),
    ("length", {"low": 2, "high": 4}, "abcde", None, 0.0),
    ("length", {"low": 2, "high": 4, "slack": 4}, "abcde", None, 0.75),
    ("length", {"low": 4, "slack": 4}, "ab", None, 0.5),
    ("length", {"high": 2, "unit": "words", "slack": 2}, "one two three", None, 0.5),
    ("length", {"high": 2, "slack": 2}, "much too long", None, 0.0),
    ("repetition", {"n": 1}, "a b c", None, 0.0),
    ("repetition", {"n": 1}, "a a a a", None, -0.75),
    ("repetition", {"n": 2}, "a b a b a", None, -0.5),
    ("repetition", {"n": 3}, "a a", None, 0.0),
    ("repetition", {"n": 1, "unit": "characters"}, "aab", None, -1 / 3),
    ("brevity", {}, "x" * 16, None, 0.5),
    ("think_format", {}, "<think>a</think>b", None, 1.0),
    ("think_format", {}, "a<think></think>", None, 0.0),
]


@pytest.mark.parametrize(("rule", "parameters", "response", "reference", "value"), CASES)
def test_value(rule: str, parameters: dict[str, Any], response: str, reference: Any, value: float) -> None:
    assert getattr(rules, rule)([[]], [response], [reference], **parameters) == [pytest.approx(value)]


@pytest.mark.parametrize("rule", ["exact_match", "numeric", "math", "regex", "code"])
@pytest.mark.parametrize("reference", [None, {"other": 1}])
def test_a_row_without_its_reference_fails_alone(rule: str, reference: Any) -> None:
    good = {"answer": "8", "pattern": "8", "tests": ["assert True"]}
    first, second = getattr(rules, rule)([[]] * 2, ["8", "8"], [reference, good])
    assert isinstance(first, Failed) and "the row's reference" in first.reason and second == 1.0


@pytest.mark.parametrize(("rule", "reference"), [("numeric", {"answer": "many"}), ("regex", {"pattern": "("}), ("code", {"tests": []}),
                                  ("code", {"tests": [1]})])
def test_a_senseless_reference_fails(rule: str, reference: Any) -> None:
    (score,) = getattr(rules, rule)([[]], ["8"], [reference])
    assert isinstance(score, Failed) and "the reference's" in score.reason


@pytest.mark.parametrize(
    ("rule", "parameters", "said"),
    [
        ("exact_match", {"extract": "box"}, "extract = 'box'"), ("numeric", {"tolerance": -1.0}, "tolerance = -1.0"),
        ("numeric", {"tolerance": float("nan")}, "tolerance = nan"), ("numeric", {"tolerance": float("inf")}, "tolerance = inf"),
        ("numeric", {"percent": "no"}, "percent = 'no'"),
        ("regex", {"pattern": "("}, r"pattern = '\('"),
        ("format", {"tags": "think"}, "tags = 'think'"), ("format", {"tags": ("a", "a")}, "tags"), ("format", {"tags": ()}, "tags"),
        ("length", {}, "low = high = 0"),
        ("length", {"low": 5, "high": 4}, "low = 5 exceeds high = 4"), ("length", {"high": 4, "unit": "tokens"}, "unit = 'tokens'"),
        ("repetition", {"n": 0}, "n = 0"), ("code", {"seconds": 0.0}, "limits must be positive"), ("code", {"workers": 0}, "workers = 0"),
        ("code", {"memory": 4}, "memory = 4, file = 16"), ("code", {"memory": 10**13}, "memory = 10000000000000"),
    ],
)
def test_senseless_parameters_are_refused_on_no_rows(rule: str, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        getattr(rules, rule)([], [], [], **parameters)
