"""SkyPilot: a managed job, which its controller moves to new machines after a preemption. Keys as in SkyPilot 0.14.1.

    sky jobs launch task.yaml --name NAME --yes --secret VARIABLE …

`run` is executed on every host of a slice. Exit code 75 recovers the job like a preemption (`job_recovery.recover_on_exit_codes`), 1 and 2 end it:
crashes are the worker's part. A secret is the environment variable of that name where `sky` is called: it travels in the request's body.
"""

from __future__ import annotations

from rlhf_jax.launch import cloud, job
from rlhf_jax.launch.plan import File, Step
from rlhf_jax.launch.request import Request

TASK = "task.yaml"


def files(request: Request) -> tuple[File, ...]:
    """The task. Its values are plain words, which YAML reads as they stand."""
    slice_ = request.topology
    region = request.zone.rpartition("-")[0]
    infra = f"gcp/{region}/{request.zone}" if request.zone else "gcp"
    secrets = "".join(f"  {variable}: null\n" for variable, _ in request.secrets)
    text = f"""# Written by `rlhf-jax launch`.
name: {request.name}
workdir: {job.folder(request)}
num_nodes: 1
resources:
  infra: {infra}
  accelerators: tpu-{slice_.accelerator}
  accelerator_args:
    runtime_version: {request.runtime or slice_.generation.runtime}
    tpu_vm: true
  use_spot: {"true" if request.spot else "false"}
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes: [75]
{"secrets:" + chr(10) + secrets if secrets else ""}run: |
  exec bash run.sh
"""
    return (File(f"{request.folder}/{TASK}", text),)


def prepare(request: Request) -> tuple[Step, ...]:
    """Once, before the job."""
    return cloud.pack(request)


def create(request: Request) -> tuple[Step, ...]:
    """Submits the job, and returns."""
    secrets = tuple(f"--secret={variable}" for variable, _ in request.secrets)
    command = ("sky", "jobs", "launch", f"{request.folder}/{TASK}", f"--name={request.name}", *secrets, "--detach-run", "--yes")
    return (cloud.forget(request), Step("submit the job", command, attempts=2))


def delete(request: Request) -> tuple[Step, ...]:
    """Cancels the job; its machines are given back."""
    return (Step("cancel the job", ("sky", "jobs", "cancel", f"--name={request.name}", "--yes")),)


def wait(request: Request) -> Step:
    """Follows the log of the job to its end."""
    return Step("follow the log to the end", ("sky", "jobs", "logs", f"--name={request.name}", "--follow"))


def status(request: Request) -> tuple[Step, ...]:
    """What SkyPilot knows, and outcomes if any."""
    return cloud.status(request, ("sky", "jobs", "queue"))


def live_logs(request: Request) -> Step:
    """The log so far."""
    return Step("the log so far", ("sky", "jobs", "logs", f"--name={request.name}", "--no-follow"), attempts=1)
