"""README.md names nothing that is not there."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_every_path_of_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([\w/.]+)\)", text) + re.findall(r"`((?:rlhf_jax|configs|experiments)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path
