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
        if h.range is not None:
            assert h.range[0] <= h.default <= h.range[1]
        assert not isinstance(h.default, str) or h.default in h.names
    card = _catalogue.card(entry)
    assert all(f"{h.name} = " in card for h in entry.hyperparameters) and entry.name in _catalogue.overview()


@pytest.mark.parametrize("name", objectives.names())
def test_the_config_writes_the_defaults(name: str) -> None:
    module, written = objectives.load(name), load_config(str(CONFIGS / f"{name}.py")).objective.to_dict()
    assert written.pop("name") == name
    assert written == module.DEFAULTS and all(type(written[key]) is type(value) for key, value in module.DEFAULTS.items())
    assert all(not (isinstance(value, float) and math.isnan(value)) for value in written.values())


@pytest.mark.parametrize(("limits", "legal"), [
    (None, ""), ((-math.inf, math.inf), ""), ((0.0, math.inf), "≥ 0"), ((-math.inf, 2.0), "≤ 2"), ((0.0, 0.5), "[0, 0.5]"),
])
def test_a_range_in_words(limits: tuple[float, float] | None, legal: str) -> None:
    assert _catalogue.Hyperparameter("beta", 0.1, limits, (), "").legal == legal


def test_names_in_words() -> None:
    assert _catalogue.Hyperparameter("kl_estimator", "k1", None, ("k1", "k2", "k3"), "").legal == "one of k1, k2, k3"
    assert "kl_estimator = 'k3', one of k1, k2, k3: of the KL" in _catalogue.card(_catalogue.entry("grpo"))


@pytest.mark.parametrize(("name", "gist"), [
    ("dpo", "Rafailov et al. 2023 (arXiv:2305.18290); needs reference; beta = 0.1"),
    ("reward", "Ouyang et al. 2022 (arXiv:2203.02155)"),
    ("grpo", "Shao et al. 2024 (arXiv:2402.03300); needs reference, score, samples in groups; "
             "beta = 0.04, clip_low = 0.2, clip_high = 0.2, ratio_level = 'token'"),
    ("gspo", "Zheng et al. 2025 (arXiv:2507.18071); needs score, samples in groups; "  # β = 0: no reference
             "clip_low = 0.0003, clip_high = 0.0004, ratio_level = 'sequence'"),
])
def test_a_gist_is_the_paper_the_needs_and_what_is_not_the_familys(name: str, gist: str) -> None:
    assert _catalogue.entry(name).gist == gist


def test_the_overview_has_two_lines_for_each() -> None:
    lines = _catalogue.overview().splitlines()
    for entry in _catalogue.entries():
        at = next(i for i, line in enumerate(lines) if line.startswith(f"  {entry.name} "))
        assert entry.title.endswith(lines[at].split(maxsplit=1)[1])
        said = lines[at + 1].strip()
        assert said == entry.gist or (said.endswith(" …") and entry.gist.startswith(said[:-2]))


def test_columns_do_not_break() -> None:
    for line in _catalogue.tables().splitlines():
        if line.startswith("| [`"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 8, line
