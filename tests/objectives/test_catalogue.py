"""README.md's tables are the modules' own words, and every hyper-parameter is explained and written out in the config."""

from __future__ import annotations

import math
import re

import pytest

from rlhf_jax import objectives
from rlhf_jax.cli.configs import load_config
from rlhf_jax.objectives import _catalogue
from tests.train.runs import CONFIGS


def test_the_readme_is_up_to_date() -> None:
    text = _catalogue.README.read_text(encoding="utf-8")
    assert text == _catalogue.page(text), "run python -m rlhf_jax.objectives._catalogue"


@pytest.mark.parametrize("name", objectives.names())
def test_an_entry_is_complete(name: str) -> None:
    entry = _catalogue.entry(name)
    assert entry.title and entry.equation and entry.use and entry.deviation
    assert re.search(r"arXiv:\d{4}\.\d{5}|\(\w+.*(19|20)\d\d|(19|20)\d\d", entry.see), entry.see
    for h in entry.hyperparameters:
        assert len(h.meaning) > 5 and not h.meaning.startswith("as in"), f"{name}: no function says what {h.name} means"
        if h.low is not None:
            assert h.low <= h.default <= h.high
    card = _catalogue.card(entry)
    assert all(f"{h.name} = " in card for h in entry.hyperparameters) and entry.name in _catalogue.overview()


@pytest.mark.parametrize("name", objectives.names())
def test_the_config_writes_the_defaults(name: str) -> None:
    module, written = objectives.load(name), load_config(str(CONFIGS / f"{name}.py")).objective.to_dict()
    assert written.pop("name") == name
    assert written == module.DEFAULTS and all(type(written[key]) is type(value) for key, value in module.DEFAULTS.items())
    assert all(not (isinstance(value, float) and math.isnan(value)) for value in written.values())


@pytest.mark.parametrize(("low", "high", "legal"), [
    (None, None, ""), (-math.inf, math.inf, ""), (0.0, math.inf, "≥ 0"), (-math.inf, 2.0, "≤ 2"), (0.0, 0.5, "[0, 0.5]"),
])
def test_a_range_in_words(low: float | None, high: float | None, legal: str) -> None:
    assert _catalogue.Hyperparameter("beta", 0.1, low, high, "").legal == legal


def test_columns_do_not_break() -> None:
    for line in _catalogue.tables().splitlines():
        if line.startswith("| [`"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 8, line
