"""The guide of objectives/README.md does what it says: its code blocks are written to files, bound, compared with DPO, and trained."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.objectives import _catalogue
from tests.objectives import tabular
from tests.train.runs import ROOT, SMALL, series

V = 5


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with the guide's files, from which a user would work; the repository's configs are importable, as in its root."""
    blocks = re.findall(r"```python\n(# my_lab/(\w+)\.py(.*?)\n.*?)```", _catalogue.README.read_text(), flags=re.DOTALL)
    assert [name for _, name, _ in blocks] == ["focal_dpo", "config", "focal_dpo"]
    folder = tmp_path / "my_lab"
    folder.mkdir()
    for text, name, _ in blocks:
        path = folder / f"{name}.py"
        path.write_text((path.read_text() if path.exists() else "") + text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[name]


def test_the_guides_objective(lab: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    fake = tabular.nets(rng, V)
    batch = tabular.with_reference(fake, tabular.comparisons(rng, 6, 8, V, filler=True))
    plain = objectives.bind({"name": "my_lab.focal_dpo", "beta": 0.3, "gamma": 0.0})
    dpo = objectives.bind({"name": "dpo", "beta": 0.3})
    found, expected = (tabular.objective(bound, fake, batch) for bound in (plain, dpo))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)
    focal = objectives.bind({"name": "my_lab.focal_dpo", "beta": 0.3, "gamma": 2.0})
    assert float(tabular.objective(focal, fake, batch)[0]) < float(tabular.objective(dpo, fake, batch)[0])
    _, carry, metrics = tabular.prepare(focal, fake, batch)
    assert float(carry["margin"]) != 0.0 and "reward/running_margin" in metrics
    assert "(1 − σ(h))^γ" in _catalogue.card(_catalogue.entry("my_lab.focal_dpo"))


def test_the_guides_command_trains(lab: pathlib.Path) -> None:
    (lab.parent / "configs").symlink_to(ROOT / "configs")
    command = re.search(r"^rlhf-jax (train --config my_lab/.*)$", _catalogue.README.read_text(), flags=re.MULTILINE)
    assert command is not None
    small = [f"--config.model.{key}={value}" for key, value in SMALL.items()]
    line = [sys.executable, "-m", "rlhf_jax.cli.main", *command[1].split(), *small]
    done = subprocess.run(line, cwd=lab.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(series(lab.parent / "runs" / "focal", "loss/focal")) == 4
