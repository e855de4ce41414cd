"""`rlhf-jax objectives`: the list, one objective, README's tables, and what it refuses."""

from __future__ import annotations

import pytest

from rlhf_jax.objectives import _catalogue
from tests.cli.conftest import Command


def test_the_list_has_paper_needs_and_key_defaults(command: Command) -> None:
    done = command("objectives")
    assert done.code == 0 and done.out.strip() == _catalogue.overview()
    lines = done.out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  dpo "))
    assert lines[at + 1].strip() == "Rafailov et al. 2023 (arXiv:2305.18290); needs reference; beta = 0.1"


def test_one_objective(command: Command) -> None:
    done = command("objectives", "orpo")
    assert done.code == 0 and "nll_over = 'response', one of response, all: " in done.out


def test_markdown_prints_the_readmes_tables(command: Command) -> None:
    done = command("objectives", "--markdown")
    assert done.code == 0 and done.out.strip() in _catalogue.README.read_text(encoding="utf-8")
    assert done.out.count("\n### ") == len(_catalogue.FAMILIES) - 1
    assert command("objectives").out.strip() == _catalogue.overview()


@pytest.mark.parametrize(("arguments", "said"), [
    (("dop",), "did you mean 'dpo'"), (("dpo", "ipo"), "'ipo' is no flag"), (("--markdown", "dpo"), "leave out 'dpo'"), (("--mark",), "markdown"),
])
def test_what_is_refused(command: Command, arguments: tuple[str, ...], said: str) -> None:
    done = command("objectives", *arguments)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1
