"""Plans before the tools' own offline validation, where they are installed: gcloud's parser, xpk's dry run, SkyPilot's task.

Nothing is sent anywhere: `gcloud meta lint-gcloud-commands` only parses, `xpk … --dry-run` only prints, `Task.from_yaml` only reads. Each gets an
empty home, so that no account is known to it.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from rlhf_jax.launch import planning
from tests.launch.asked import config, request
from tests.launch.test_readme import commands


def bare(folder):
    """An environment in which no tool knows an account."""
    return {**os.environ, "HOME": str(folder), "CLOUDSDK_CONFIG": str(folder / "gcloud"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}


def run(command, folder):
    return subprocess.run(command, check=False, capture_output=True, text=True, env=bare(folder), cwd=folder, timeout=120)


def write(plan, folder):
    for file in plan.files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_text(file.text)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_knows_every_command_and_flag(tmp_path):
    plans = [planning.start(request(**changes), config()) for changes in (
        {"service_account": "a@p.iam.gserviceaccount.com"}, {"topology": "v4:4x4x16", "slices": 2}, {"backend": "tpu-vm", "topology": "v5p:4x4x4"})]
    plans += [planning.act(request(backend=backend), action, live=live)
              for backend in ("queued", "tpu-vm") for action, live in (("status", False), ("logs", False), ("logs", True), ("stop", False))]
    found = {step.command for plan in plans for step in (*plan.steps, *plan.clean_up)} | {plan.outcomes for plan in plans if plan.outcomes}
    texts = {shlex.join(command) for command in found if command[0] == "gcloud"} | set(commands("gcloud"))
    assert len(texts) >= 12
    wrong = "gcloud compute tpus tpu-vm list --zonee=x"
    (tmp_path / "commands.json").write_text(json.dumps([{"command_string": text} for text in [*sorted(texts), wrong]]))
    parsed = run(["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path}/commands.json"], tmp_path)
    if parsed.returncode:
        pytest.skip("this gcloud has no lint-gcloud-commands")
    refused = {answer["command_string"]: answer["error_message"] for answer in json.loads(parsed.stdout) if not answer["success"]}
    assert list(refused) == [wrong], refused


@pytest.mark.skipif(importlib.util.find_spec("xpk") is None, reason="xpk is not installed")
@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:2x4", "v5p:4x4x16", "v4:2x2x4"])
def test_xpk_makes_a_manifest_of_the_plan(topology, tmp_path):
    plan = planning.start(request(backend="xpk", topology=topology, slices=2), config())
    write(plan, tmp_path)
    command = [sys.executable, "-m", "xpk.main", *plan.steps[-1].command[1:], "--dry-run", "--skip-validation", "--output-manifest-file=m.yaml"]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = (tmp_path / "m.yaml").read_text()
    assert "(bash run.sh)" in manifest and "maxRestarts: 100" in manifest and "values: [42,75,127," in manifest
    assert f"cloud.google.com/gke-tpu-topology: {topology.partition(':')[2]}" in manifest
    assert "replicas: 2" in manifest and f"parallelism: {request(backend='xpk', topology=topology).processes}" in manifest
    assert "terminationGracePeriodSeconds: 300" in manifest


@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="SkyPilot is not installed")
@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:16x16", "v5p:4x4x4", "v4:2x2x4"])
def test_skypilot_reads_the_task_of_the_plan(topology, tmp_path):
    plan = planning.start(request(backend="sky", topology=topology, secrets=(("WANDB_API_KEY", "WANDB_API_KEY"),)), config())
    write(plan, tmp_path)
    read = ("import sky, yaml; sky.Task.from_yaml('plan/task.yaml'); "  # and as `sky jobs launch --secret` does:
            "t = sky.Task.from_yaml_config(yaml.safe_load(open('plan/task.yaml')), secrets_overrides=[('WANDB_API_KEY', 'x')]); (r,) = t.resources; "
            "print(t.name, t.num_nodes, r.accelerators, r.use_spot, r.zone, r.job_recovery, sorted(t.secrets))")
    done = run([sys.executable, "-c", read], tmp_path)
    assert done.returncode == 0, done.stderr
    accelerator = request(topology=topology).topology.accelerator
    recovery = {"strategy": None, "max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    assert done.stdout.strip().splitlines()[-1].startswith(f"ppo-1 1 {{'tpu-{accelerator}': 1}} True us-west4-a")
    assert all(str(value) in done.stdout for value in recovery.values()) and done.stdout.strip().endswith("['WANDB_API_KEY']")
