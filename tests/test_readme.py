"""README's example of a new objective is run as it stands: its two files, its command."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_the_objective_of_the_readme_trains(tmp_path):
    blocks = re.findall(r"```python\n# (my_lab/\w+\.py)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["my_lab/simpo.py", "my_lab/config.py"]
    for name, text in blocks:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    command = [sys.executable, "-m", "rlhf_jax.cli.main", "train", "--config", "my_lab/config.py:tiny", "--workdir", "runs/simpo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss/simpo" in (tmp_path / "runs" / "simpo" / "metrics.jsonl").read_text()


def test_every_path_of_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([\w/.]+)\)", text) + re.findall(r"`((?:rlhf_jax|configs|experiments)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path
