"""The guide's own commands: every `rlhf-jax launch` in it makes a plan, and `gcloud` is shown to gcloud's parser in test_tools."""

import re
import shlex

import pytest

from tests.cli.conftest import command  # noqa: F401
from tests.launch.asked import ROOT

README = (ROOT / "rlhf_jax/launch/README.md").read_text()


def commands(program: str) -> list[str]:
    """Commands of the guide's code blocks, their lines joined, without comments; those with … in them are shapes, not commands."""
    blocks = "\n".join(re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in blocks.splitlines()]
    return [re.sub(r"\s+", " ", line[line.index(program):]) for line in lines if re.search(rf"(^|\| ){program} ", line) and "…" not in line]


STARTS = commands("rlhf-jax")


def test_there_are_commands():
    assert len(STARTS) == 4 and len(commands("gcloud")) >= 6


@pytest.mark.parametrize("line", STARTS)
def test_every_launch_makes_a_plan(line, command, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    arguments = [word for word in shlex.split(line)[2:] if word != "--dry-run"]
    done = command("launch", *arguments, "--dry-run")
    assert done.code == 0 and " on queued" in done.out.splitlines()[0], done.err
