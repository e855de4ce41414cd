"""The folder that machines get: the resolved config, what is installed, and the packed tree."""

import json
import math
import os
import subprocess
import tarfile

import pytest

from rlhf_jax.cli.configs import load_config
from rlhf_jax.errors import UserError
from rlhf_jax.launch import job, planning
from rlhf_jax.launch.pack import pack
from rlhf_jax.train.config import check, plain
from tests.launch.asked import ROOT, config, request


def files(asked, settings):
    return {file.path.rpartition("/")[2]: file.text for file in job.files(asked, settings)}


def loaded(text, folder):
    path = folder / "config.py"
    path.write_text(text)
    return plain(load_config(str(path)))


def test_the_config_travels_resolved(tmp_path):
    settings = config(objective__kl_coef=0.07)
    again = loaded(files(request(), settings)["config.py"], tmp_path)
    assert again["data"]["train"] == "../inputs/data.train/prompts.jsonl"
    again["data"]["train"] = settings["data"]["train"]
    assert again == settings
    assert again["objective"]["kl_coef"] == 0.07 and math.isinf(again["objective"]["kl_horizon"])


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo", "grpo", "reward", "lm"])
def test_a_resolved_tiny_config_is_legal_and_names_files_of_the_package_there(name, tmp_path):
    settings, _ = check(load_config(f"{ROOT}/configs/{name}.py:tiny"))
    text = files(request(topology="v5e:1x1"), settings)["config.py"]
    assert "PACKAGE + '/data/samples/" in text and str(ROOT) not in text
    again, _ = check(loaded(text, tmp_path))
    assert again == settings


def test_rows_of_dicts_survive(tmp_path):
    entries = ({"name": "rules.brevity", "weight": 0.5}, {"name": "learned", "run": "gs://bucket/runs/reward"})
    settings = config(reward_from="", rewards=entries)
    assert loaded(files(request(), settings)["config.py"], tmp_path)["rewards"] == entries


def test_the_job_names_what_is_fetched_and_no_secret():
    asked = request(secrets=(("WANDB_API_KEY", "wandb-key"),), max_restarts=3)
    assert json.loads(files(asked, config())["job.json"]) == {
        "run_id": "ppo-1",
        "command": ["rlhf-jax", "train", "--config", "../config.py", "--workdir", "gs://bucket/runs/ppo-1"],
        "inputs": [["gs://bucket/data/prompts.jsonl", "../inputs/data.train/prompts.jsonl"]],
        "mirror": "",
        "reports": "gs://bucket/runs/ppo-1/launch",
        "secrets": {"WANDB_API_KEY": "projects/proj/secrets/wandb-key"},
        "max_restarts": 3,
    }


def test_an_experiment_runs_its_pipeline_on_a_mirrored_folder():
    asked = request(experiment="demo", topology="v5e:1x1", pipeline_flags=("--scale=0.1", "--tasks=sort"))
    made = {file.path.rpartition("/")[2]: file.text for file in planning.start(asked, None).files}
    assert "config.py" not in made
    described = json.loads(made["job.json"])
    assert described["command"] == ["python", "experiments/demo/pipeline.py", "--workdir", "../work", "--scale=0.1", "--tasks=sort"]
    assert described["mirror"] == "gs://bucket/runs/ppo-1"


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("tree", "--editable ./code[tpu,gcs]\n"),
        ("git+https://github.com/me/r@v1", "rlhf-jax[tpu,gcs] @ git+https://github.com/me/r@v1\n"),
        ("rlhf-jax==0.1.0", "rlhf-jax[tpu,gcs]==0.1.0\n"),
        ("rlhf-jax", "rlhf-jax[tpu,gcs]\n"),
    ],
)
def test_requirements(code, line):
    assert files(request(code=code), config())["requirements.txt"] == line


@pytest.fixture
def tree(tmp_path):
    """A small git working tree: a tracked file, a new one, an ignored one, and a tracked one that was deleted."""
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    for name, text in {"a.py": "1\n", "sub/b.sh": "2\n", "gone.py": "", ".gitignore": ".env\n", ".env": "KEY=1\n"}.items():
        (root / name).write_text(text)
    (root / "sub/b.sh").chmod(0o755)
    git = ("git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "a.py", "gone.py", ".gitignore"], check=True)
    (root / "gone.py").unlink()
    return root


def test_the_packed_tree_depends_on_its_content_alone_and_leaves_ignored_files(tree, tmp_path):
    digest = pack(tree, tmp_path / "one.tar.gz")
    os.utime(tree / "a.py", (1, 1))
    assert pack(tree, tmp_path / "two.tar.gz") == digest
    with tarfile.open(tmp_path / "one.tar.gz") as archive:
        assert [(entry.name, entry.mode) for entry in archive] == [(".gitignore", 0o644), ("a.py", 0o644), ("sub/b.sh", 0o755)]
    (tree / "a.py").write_text("3\n")
    assert pack(tree, tmp_path / "two.tar.gz") != digest


def test_what_is_no_tree_or_too_large_is_refused(tree, tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(UserError, match="no git working tree"):
        pack(tmp_path / "none", tmp_path / "x.tar.gz")
    monkeypatch.setattr("rlhf_jax.launch.pack.LARGEST", 1)
    with pytest.raises(UserError, match=r"\.gitignore"):
        pack(tree, tmp_path / "x.tar.gz")
