"""config.rewards: what an entry means, and one sentence for each mistake."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import entries, rules
from rlhf_jax.rewards.combine import Share


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = types.ModuleType("my_rewards")
    made.length = lambda prompts, responses, references, *, unit=1: [len(r) / unit for r in responses]
    made.needs = lambda prompts, responses, references, *, unit: [len(r) / unit for r in responses]
    monkeypatch.setitem(sys.modules, "my_rewards", made)


def test_what_an_entry_means() -> None:
    first, second, third, fourth = entries.parse((
        {"name": "rules.numeric"},
        {"name": "my_rewards:length", "label": "size", "weight": -2, "clip": (0, 5), "normalise": (1, 2), "each": True, "unit": 4},
        {"name": "learned", "run": "runs/rm", "normalise": "batch"},
        {"name": "implicit", "run": "runs/dpo", "reference": "runs/sft", "beta": 1, "label": "dpo"},
    ))
    assert first.share == Share("numeric") and first.function is not None and first.function([[]], ["7"], [{"answer": 7}]) == [1.0]
    assert second.share == Share("size", -2.0, (0.0, 5.0), False, (1.0, 2.0)) and second.each
    assert second.function is not None and second.function([[]], ["12345678"], [None]) == [2.0]
    assert third.share == Share("learned", over_batch=True) and third.function is None and third.parameters == {"run": "runs/rm"}
    assert fourth.share.label == "dpo" and fourth.parameters["beta"] == 1


def test_the_short_form() -> None:
    assert entries.load_function("rules.brevity", "config.reward_fn")([], ["x" * 16], []) == [0.5]
    assert entries.load_function("rlhf_jax.rewards.rules.brevity", "config.reward_fn") is rules.brevity
    with pytest.raises(UserError, match=r"config\.reward_fn = 'rules\.numric'.*did you mean 'numeric'"):
        entries.load_function("rules.numric", "config.reward_fn")


def test_lists_are_tuples_when_they_come_from_json() -> None:
    (entry,) = entries.parse([{"name": "rules.format", "tags": ["a", "b"], "clip": [0, 1]}])
    assert entry.function is not None and entry.function([[]], ["<a>1</a><b>2</b>"], [None]) == [1.0] and entry.share.clip == (0.0, 1.0)


NETWORK = {"name": "learned", "run": "r"}
MISTAKES: dict[str, tuple[Any, str]] = {
    "no tuple": ("rules.numeric", "must be a tuple of dicts"),
    "a dict": ({"name": "rules.numeric"}, "must be a tuple of dicts"),
    "no dict in it": (("rules.numeric",), r"rewards\[0\] = 'rules.numeric': must be a dict"),
    "no name": (({"weight": 1.0},), r"rewards\[0\]\.name = None"),
    "no such rule": (({"name": "rules.exact"},), r"rewards\[0\] = 'rules\.exact' is no rule.*did you mean 'exact_match'"),
    "no such module": (({"name": "nowhere.f"},), r"rewards\[0\].*'nowhere\.f'"),
    "second entry": (({"name": "rules.math"}, {"name": "rules.lenght"}), r"rewards\[1\]"),
    "unknown parameter": (({"name": "rules.numeric", "tolernce": 1.0},), r"rewards\[0\]\.tolernce.*did you mean 'tolerance'"),
    "unknown key": (({"name": "rules.brevity", "wieght": 1.0},), r"rewards\[0\]\.wieght.*did you mean 'weight'"),
    "parameter's type": (({"name": "rules.numeric", "tolerance": "1"},), r"rewards\[0\]\.tolerance = '1': must be a float"),
    "bool for an int": (({"name": "rules.length", "high": True},), r"rewards\[0\]\.high = True: must be a int"),
    "int for a bool": (({"name": "rules.format", "partial": 1},), r"rewards\[0\]\.partial = 1: must be a bool"),
    "parameter's value": (({"name": "rules.regex", "pattern": "("},), r"rewards\[0\]\.pattern = '\('"),
    "function's parameter": (({"name": "my_rewards.length", "untis": 1},), r"rewards\[0\] expected a function .* with untis"),
    "function's missing parameter": (({"name": "my_rewards.needs"},), r"rewards\[0\] expected a function"),
    "weight": (({"name": "rules.math", "weight": "1"},), r"rewards\[0\]\.weight = '1'"),
    "infinite weight": (({"name": "rules.math", "weight": float("inf")},), r"rewards\[0\]\.weight = inf"),
    "clip": (({"name": "rules.math", "clip": (1, 0)},), r"rewards\[0\]\.clip = \(1, 0\)"),
    "half a clip": (({"name": "rules.math", "clip": 1.0},), r"rewards\[0\]\.clip = 1\.0"),
    "normalise": (({"name": "rules.math", "normalise": "running"},), r"rewards\[0\]\.normalise = 'running'"),
    "deviation": (({"name": "rules.math", "normalise": (0.0, 0.0)},), r"rewards\[0\]\.normalise = \(0\.0, 0\.0\)"),
    "nothing stored": (({"name": "rules.math", "normalise": "stored"},), r"rewards\[0\]\.normalise = 'stored'"),
    "each": (({"name": "rules.math", "each": 1},), r"rewards\[0\]\.each = 1"),
    "each of a network": (({**NETWORK, "each": True},), r"rewards\[0\]\.each"),
    "label": (({"name": "rules.math", "label": "a b"},), r"rewards\[0\]\.label = 'a b'"),
    "label taken": (({"name": "rules.math", "label": "failed"},), r"rewards\[0\]\.label = 'failed'"),
    "two of a label": (({"name": "rules.math"}, {"name": "rules.math", "weight": 2.0}), r"rewards\[1\] and config\.rewards\[0\].*reward/math"),
    "no run": (({"name": "learned"},), r"rewards\[0\]\.run = None"),
    "unknown to a network": (({**NETWORK, "rnu": "r"},), r"rewards\[0\]\.rnu.*did you mean 'run'"),
    "no beta": (({"name": "implicit", "run": "r", "reference": "s"},), r"rewards\[0\]\.beta = None"),
    "beta": (({"name": "implicit", "run": "r", "reference": "s", "beta": 0.0},), r"rewards\[0\]\.beta = 0\.0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake: str) -> None:
    rewards, said = MISTAKES[mistake]
    with pytest.raises(UserError, match=said) as caught:
        entries.parse(rewards)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("config.rewards")
