"""Every command of every backend, element by element."""

import dataclasses
import json
import shlex
import sys

import pytest

from rlhf_jax.launch import planning
from rlhf_jax.launch.plan import as_json, as_text
from tests.launch.asked import config, request

PROJECT, PLACE = "--project=proj", ("--project=proj", "--zone=us-west4-a")
PACK = (sys.executable, "-m", "rlhf_jax.launch.pack", ".", "plan/job/code.tar.gz")
UPLOAD = ("gcloud", "storage", "rsync", "plan/job", "gs://bucket/runs/ppo-1/launch/job", "--recursive",
          "--delete-unmatched-destination-objects", PROJECT)
FORGET = ("gcloud", "storage", "rm", "gs://bucket/runs/ppo-1/launch/outcome/**", PROJECT)
OUTCOMES = ("gcloud", "storage", "cat", "gs://bucket/runs/ppo-1/launch/outcome/*", PROJECT)
SCOPES, STARTUP = "--scopes=https://www.googleapis.com/auth/cloud-platform", "--metadata-from-file=startup-script=plan/startup.sh"
QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
VM = ("gcloud", "compute", "tpus", "tpu-vm")


@pytest.fixture(scope="module")
def ppo():
    return config()


def commands(steps):
    return [step.command for step in steps]


def test_queued(ppo):
    plan = planning.start(request(), ppo)
    create = (*QUEUED, "create", "ppo-1", "--node-id=ppo-1", *PLACE, "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite",
              "--spot", SCOPES, STARTUP, "--async")
    delete = (*QUEUED, "delete", "ppo-1", *PLACE, "--force", "--quiet")
    assert commands(plan.steps) == [PACK, UPLOAD, FORGET, create]
    assert plan.watch.state == (*QUEUED, "describe", "ppo-1", *PLACE, "--format=value(state.state)")
    assert (plan.watch.lost, plan.watch.failed, plan.watch.processes) == (("SUSPENDING", "SUSPENDED"), ("FAILED",), 4)
    assert commands(plan.watch.recover) == [delete, FORGET, create]
    assert plan.outcomes == OUTCOMES and commands(plan.clean_up) == [delete]
    assert plan.wait is None and (plan.crashes, plan.preemptions) == (5, 100)
    assert [file.path for file in plan.files] == [f"plan/job/{name}" for name in ("config.py", "job.json", "requirements.txt", "run.sh")] + [
        "plan/startup.sh"]


def test_queued_in_several_slices_on_demand_of_a_chosen_shape(ppo):
    asked = request(topology="v4:4x4x16", slices=2, spot=False, runtime="tpu-x", service_account="sa@proj.iam", code="git+https://github.com/me/r@v1",
                    keep=True)
    plan = planning.start(asked, ppo)
    assert commands(plan.steps)[-1] == (
        *QUEUED, "create", "ppo-1", "--node-count=2", "--node-prefix=ppo-1", *PLACE, "--type=v4", "--topology=4x4x16", "--runtime-version=tpu-x",
        "--service-account=sa@proj.iam", SCOPES, STARTUP, "--async")
    assert commands(plan.steps)[:-1] == [UPLOAD, FORGET]
    assert plan.watch.processes == 128 and plan.clean_up == ()


def test_tpu_vm(ppo):
    plan = planning.start(request(backend="tpu-vm", topology="v5p:4x4x4"), ppo)
    create = (*VM, "create", "ppo-1", *PLACE, "--accelerator-type=v5p-128", "--version=v2-alpha-tpuv5", "--spot", SCOPES, STARTUP)
    delete = (*VM, "delete", "ppo-1", *PLACE, "--quiet")
    assert commands(plan.steps) == [PACK, UPLOAD, FORGET, create]
    assert plan.steps[-1].attempts == 100
    assert plan.watch.state == (*VM, "describe", "ppo-1", *PLACE, "--format=value(state)")
    assert (plan.watch.lost, plan.watch.failed, plan.watch.processes) == (("PREEMPTED",), ("STOPPED", "TERMINATED"), 16)
    assert commands(plan.watch.recover) == [delete, FORGET, create]
    assert plan.outcomes == OUTCOMES and commands(plan.clean_up) == [delete]


def test_xpk(ppo):
    plan = planning.start(request(backend="xpk", slices=2, image="python:3.13"), ppo)
    where = ("--cluster=c1", *PLACE)
    assert commands(plan.steps) == [PACK, FORGET, (
        "xpk", "workload", "create", "--workload=ppo-1", *where, "--tpu-type=v5litepod-16", "--num-slices=2", "--base-docker-image=python:3.13",
        "--script-dir=plan/job", "--command=bash run.sh", "--max-restarts=100", "--restart-on-exit-codes=75",
        "--termination-grace-period-seconds=300", "--spot")]
    assert plan.wait.command == ("xpk", "workload", "list", *where, "--wait-for-job-completion=ppo-1")
    assert plan.outcomes == OUTCOMES and plan.watch is None and plan.clean_up == ()


def test_sky(ppo):
    plan = planning.start(request(backend="sky", topology="v6e:16x16", secrets=(("WANDB_API_KEY", "WANDB_API_KEY"),)), ppo)
    assert commands(plan.steps) == [PACK, FORGET, (
        "sky", "jobs", "launch", "plan/task.yaml", "--name=ppo-1", "--secret=WANDB_API_KEY", "--detach-run", "--yes")]
    assert plan.wait.command == ("sky", "jobs", "logs", "--name=ppo-1", "--follow")
    assert plan.outcomes == OUTCOMES and plan.watch is None and plan.clean_up == ()
    assert plan.files[-1].path == "plan/task.yaml"
    assert plan.files[-1].text == """# Written by `rlhf-jax launch`.
name: ppo-1
workdir: plan/job
num_nodes: 1
resources:
  infra: gcp/us-west4/us-west4-a
  accelerators: tpu-v6e-256
  accelerator_args:
    runtime_version: v2-alpha-tpuv6e
    tpu_vm: true
  use_spot: true
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes: [75]
secrets:
  WANDB_API_KEY: null
run: |
  exec bash run.sh
"""


def test_detached_nothing_is_watched_and_nothing_deleted(ppo):
    for backend in planning.BACKENDS:
        plan = planning.start(request(backend=backend), ppo, detach=True)
        assert plan.steps and (plan.wait, plan.watch, plan.outcomes, plan.clean_up) == (None, None, (), ())


@pytest.mark.parametrize(
    ("backend", "action", "live", "expected"),
    [
        ("queued", "status", False, [(*QUEUED, "describe", "ppo-1", *PLACE, "--format=value(state.state)"), OUTCOMES]),
        ("queued", "stop", False, [(*QUEUED, "delete", "ppo-1", *PLACE, "--force", "--quiet")]),
        ("queued", "logs", False, [("gcloud", "storage", "cat", "gs://bucket/runs/ppo-1/launch/logs/*", "--display-url", PROJECT)]),
        ("queued", "logs", True, [(*QUEUED, "ssh", "ppo-1", *PLACE, "--node=all", "--worker=all",
                                   "--command=sudo tail -n 100 /var/lib/rlhf-jax/ppo-1/job/worker.log")]),
        ("tpu-vm", "status", False, [(*VM, "describe", "ppo-1", *PLACE, "--format=value(state)"), OUTCOMES]),
        ("tpu-vm", "stop", False, [(*VM, "delete", "ppo-1", *PLACE, "--quiet")]),
        ("tpu-vm", "logs", True, [(*VM, "ssh", "ppo-1", *PLACE, "--worker=all",
                                   "--command=sudo tail -n 100 /var/lib/rlhf-jax/ppo-1/job/worker.log")]),
        ("xpk", "status", False, [("xpk", "workload", "list", "--cluster=c1", *PLACE, "--filter-by-job=ppo-1"), OUTCOMES]),
        ("xpk", "stop", False, [("xpk", "workload", "delete", "--workload=ppo-1", "--cluster=c1", *PLACE, "--force")]),
        ("xpk", "logs", True, [("kubectl", "logs", "--selector=jobset.sigs.k8s.io/jobset-name=ppo-1", "--prefix", "--tail=100",
                                "--max-log-requests=4")]),
        ("sky", "status", False, [("sky", "jobs", "queue"), OUTCOMES]),
        ("sky", "stop", False, [("sky", "jobs", "cancel", "--name=ppo-1", "--yes")]),
        ("sky", "logs", True, [("sky", "jobs", "logs", "--name=ppo-1", "--no-follow")]),
    ],
)
def test_actions(backend, action, live, expected):
    plan = planning.act(request(backend=backend), action, live=live)
    assert commands(plan.steps) == expected
    assert plan.files == () and plan.outcomes == ()


@pytest.mark.parametrize("backend", list(planning.BACKENDS))
def test_the_printed_plan_holds_every_file_and_every_command(ppo, backend):
    plan = planning.start(request(backend=backend, secrets=(("TOKEN", "TOKEN"),)), ppo)
    text, data = as_text(plan), json.loads(as_json(plan))
    assert data == json.loads(json.dumps(dataclasses.asdict(plan)))
    for file in plan.files:
        assert f"— file {file.path}\n" in text
        assert all(line in text for line in file.text.splitlines())
    steps = (*plan.steps, *plan.clean_up, *((plan.wait,) if plan.wait else ()), *(plan.watch.recover if plan.watch else ()))
    assert all(shlex.join(step.command) in text for step in steps)


def test_a_plan_is_a_function_of_its_arguments(ppo):
    for backend in planning.BACKENDS:
        assert planning.start(request(backend=backend), ppo) == planning.start(request(backend=backend), config())
