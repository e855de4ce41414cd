"""README.md's tables are the code's: every name with its parameters and defaults, every key; its function and its entries work."""

from __future__ import annotations

import inspect
import pathlib
import re
import sys
from typing import Any

from rlhf_jax.rewards import combine, entries, judge, rules

README = (pathlib.Path(entries.__file__).parent / "README.md").read_text()


def table(name: str) -> dict[str, list[str]]:
    text = README.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.strip().split("\n")[2:]]
    return {row[0].strip("`| "): row for row in cells}


def parameters(function: Any) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def written(cell: str) -> dict[str, Any]:
    found = {}
    for piece in re.findall(r"`([^`]*)`", cell):
        name, given, value = piece.partition("=")
        found[name] = eval(value, {}) if given else inspect.Parameter.empty
    return found


def test_names_and_parameters() -> None:
    rows = table("names")
    assert set(rows) == {*(f"rules.{name}" for name in rules.NAMES), "judge", *entries.NETWORKS, "my_module.my_function"}
    for name in rules.NAMES:
        has = parameters(getattr(rules, name))
        assert (written(rows[f"rules.{name}"][1]) if has else {}) == has, name
    expected = parameters(judge.reward)
    assert written(rows["judge"][1]) == {**expected, "rubric": inspect.Parameter.empty}
    for name, keys in entries.NETWORKS.items():
        assert tuple(written(rows[name][1])) == keys


def test_every_rule_is_listed() -> None:
    public = {name for name, value in vars(rules).items() if inspect.isfunction(value) and value.__module__ == rules.__name__ and name[0] != "_"}
    assert public == set(rules.NAMES)


def test_keys() -> None:
    assert {name: row[1].rstrip(" |") for name, row in table("keys").items()} == entries.COMMON


def test_the_example_is_legal_and_the_function_runs(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    first, own = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    from ml_collections import ConfigDict

    c = ConfigDict()
    exec(first, {"c": c})
    parsed = entries.parse(c.rewards)
    assert [entry.share.label for entry in parsed] == ["math", "format", "learned"]
    assert parsed[2].stored and parsed[2].share == combine.Share("learned", 0.5, (-5.0, 5.0))
    (tmp_path / "my_rewards.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (entry,) = entries.parse(({"name": "my_rewards.shorter", "limit": 3},))
    assert entry.function is not None and entry.function([[]] * 2, ["abc", "abcd"], [None] * 2) == [1.0, 0.0]
    sys.modules.pop("my_rewards", None)
