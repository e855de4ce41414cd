"""`rlhf-jax launch`: a dry run prints the plan and does nothing; mistakes are one sentence."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Command
from tests.train.runs import CONFIGS

TINY = f"--config={CONFIGS / 'ppo.py'}:tiny"
WHERE = ("--name=ppo-1", "--project=proj", "--zone=us-west4-a", "--workdir=gs://bucket/runs/ppo-1")
QUEUED = ("--backend=queued", "--topology=v5e:1x1", *WHERE)


@pytest.mark.parametrize(
    ("backend", "asks"),
    [
        ("queued", "gcloud compute tpus queued-resources create ppo-1 "), ("tpu-vm", "gcloud compute tpus tpu-vm create ppo-1 "),
        ("sky", "sky jobs launch runs/launch/ppo-1/task.yaml "),
    ],
)
def test_a_dry_run_prints_the_plan(command: Command, tmp_path, monkeypatch, backend, asks):
    monkeypatch.chdir(tmp_path)
    outcome = command("launch", f"--backend={backend}", "--topology=v5e:1x1", *WHERE, TINY, "--config.run.steps=7", "--dry-run")
    assert outcome.code == 0 and outcome.err == ""
    assert f"$ {asks}" in outcome.out and "'steps': 7," in outcome.out and "— file runs/launch/ppo-1/job/run.sh" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_json(command: Command):
    outcome = command("launch", *QUEUED, TINY, "--secret=WANDB_API_KEY=wandb-key", "--dry-run", "--json")
    plan = json.loads(outcome.out)
    assert outcome.code == 0 and plan["steps"][-1]["command"][:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "ppo-1"]
    job = next(file["text"] for file in plan["files"] if file["path"] == "runs/launch/ppo-1/job/job.json")
    assert json.loads(job)["secrets"] == {"WANDB_API_KEY": "projects/proj/secrets/wandb-key"}


def test_an_experiment(command: Command):
    outcome = command("launch", *QUEUED, "--experiment=demo", "--pipeline-flag=--scale=0.1", "--dry-run")
    assert outcome.code == 0 and '"experiments/demo/pipeline.py"' in outcome.out and '"--scale=0.1"' in outcome.out


@pytest.mark.parametrize("action", ["status", "logs", "stop"])
def test_actions(command: Command, action):
    outcome = command("launch", action, "--backend=queued", *WHERE, "--dry-run")
    assert outcome.code == 0 and outcome.out.startswith(f"{action} ppo-1 on queued") and "$ gcloud " in outcome.out


TOKEN = "hf_" + "Ab1" * 10
MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no such action": (["stopp", *QUEUED], ("'stopp'", "'stop'")),
    "no backend": ([TINY, *WHERE], ("--backend", "queued, tpu-vm, xpk, sky")),
    "no such backend": (["--backend=slurm", TINY, *WHERE], ("--backend", "slurm")),
    "no name": (["--backend=queued", TINY, "--topology=v5e:1x1"], ("--name",)),
    "no topology": (["--backend=queued", TINY, *WHERE], ("--topology", "v5e:4x4")),
    "no such topology": ([*QUEUED, TINY, "--topology=v5e:4x5"], ("v5e:4x5", "v5e:4x4")),
    "neither config nor experiment": ([*QUEUED], ("--config is missing",)),
    "both": ([*QUEUED, TINY, "--experiment=demo"], ("--experiment", "--config")),
    "no such experiment": ([*QUEUED, "--experiment=dmo"], ("'dmo'", "'demo'")),
    "a mistake in the config": ([*QUEUED, TINY, "--config.optimizer.lr=-1"], ("config.optimizer.lr",)),
    "a mesh that does not fit": ([*QUEUED, TINY, "--topology=v5e:2x4"], ("config.mesh", "8 chips")),
    "a secret itself": ([*QUEUED, TINY, f"--secret=HF_TOKEN={TOKEN}"], ("--secret HF_TOKEN", "gcloud secrets create")),
    "a secret in the config": ([*QUEUED, TINY, f"--config.log.wandb={TOKEN}"], ("config.log.wandb", "--secret")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(command: Command, name):
    arguments, said = MISTAKES[name]
    outcome = command("launch", *arguments, "--dry-run")
    assert outcome.code == 2 and outcome.out == "" and outcome.err.startswith("rlhf-jax: ")
    assert all(part in outcome.err for part in said), outcome.err
    assert TOKEN not in outcome.err
