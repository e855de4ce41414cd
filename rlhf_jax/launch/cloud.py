"""What the backends on plain TPU VMs share: gcloud's arguments, the bucket, and the start-up script. Flags as in gcloud 528.0.0.

The machines get `job/` from the bucket in their start-up script, which Compute Engine runs as root at every boot: nobody logs in, no key is needed,
and a machine that was rebooted goes on by itself.
"""

from __future__ import annotations

import shlex
import sys

from rlhf_jax.launch import job
from rlhf_jax.launch.plan import Command, File, Step
from rlhf_jax.launch.request import TREE, Request
from rlhf_jax.launch.worker import LOG

STARTUP = "startup.sh"


def place(request: Request) -> Command:
    """--project and --zone."""
    return (f"--project={request.project}", f"--zone={request.zone}")


def machine(request: Request, version_flag: str) -> Command:
    """What `create` says of the machines.

    Args:
      request: checked.
      version_flag: the software version's flag, which the two commands name differently.
    """
    slice_ = request.topology
    by_shape = slice_.generation.by_shape and slice_.chips >= 64  # where a size may stand for one of several shapes, the shape is said
    kind = (f"--type={slice_.generation.name}", f"--topology={slice_.text}") if by_shape else (f"--accelerator-type={slice_.accelerator}",)
    account = (f"--service-account={request.service_account}",) if request.service_account else ()
    return (*kind, f"--{version_flag}={request.runtime or slice_.generation.runtime}", *(("--spot",) if request.spot else ()), *account,
            "--scopes=https://www.googleapis.com/auth/cloud-platform", f"--metadata-from-file=startup-script={request.folder}/{STARTUP}")


def tail(request: Request) -> str:
    """Shows the end of one machine's log."""
    return f"sudo tail -n 100 /var/lib/rlhf-jax/{request.name}/job/{LOG}"


def files(request: Request) -> tuple[File, ...]:
    """Beside the job: the start-up script of every machine."""
    home = f"/var/lib/rlhf-jax/{request.name}"
    unit = f"rlhf-jax-{request.name}"
    text = f"""#!/usr/bin/env bash
# Fetches this run's job and starts it, at every boot. Written by `rlhf-jax launch`.
set -uo pipefail
export HOME=/root PATH="$PATH:/snap/bin"
job={shlex.quote(home + "/job")}
source={shlex.quote(request.bucket + "/job")}
mkdir -p "$job"
pause=5
until gcloud storage cp --recursive "$source/*" "$job/"; do
  echo "cannot read $source; again in $pause s" >&2
  sleep "$pause"
  pause=$((pause * 2 < 300 ? pause * 2 : 300))
done
# A unit of its own: at shutdown the worker is told by SIGTERM, passes it on, and has five minutes to save.
exec systemd-run --unit={unit} --collect --setenv=HOME=/root --property=KillMode=mixed --property=TimeoutStopSec=300 bash "$job/run.sh"
"""
    return (File(f"{request.folder}/{STARTUP}", text),)


def pack(request: Request) -> tuple[Step, ...]:
    """Puts the working tree into `job/`, if it is what runs."""
    if request.code != TREE:
        return ()
    target = f"{job.folder(request)}/{job.CODE}"
    return (Step("pack the working tree", (sys.executable, "-m", "rlhf_jax.launch.pack", request.root, target), attempts=1),)


def prepare(request: Request) -> tuple[Step, ...]:
    """Once, before the machines: `job/` goes to where they look for it, and what is no longer in it goes."""
    command = ("gcloud", "storage", "rsync", job.folder(request), f"{request.bucket}/job", "--recursive", "--delete-unmatched-destination-objects",
               *_project(request))
    return (*pack(request), Step("copy the job to the bucket", command))


def forget(request: Request) -> Step:
    """Removes the outcomes of machines that were."""
    return Step("forget earlier outcomes", ("gcloud", "storage", "rm", f"{request.bucket}/outcome/**", *_project(request)), attempts=1, may_fail=True)


def outcomes(request: Request) -> Command:
    """Prints `HOST CODE` of every process that has ended."""
    return ("gcloud", "storage", "cat", f"{request.bucket}/outcome/*", *_project(request))


def status(request: Request, state: Command) -> tuple[Step, ...]:
    """The state of the machines, and outcomes if any."""
    return (Step("state", state, attempts=1), Step("outcomes", outcomes(request), attempts=1, may_fail=True))


def logs(request: Request) -> Step:
    """Prints the logs of all machines, those that are gone included; at most half a minute old."""
    return Step("the logs of all machines", ("gcloud", "storage", "cat", f"{request.bucket}/logs/*", "--display-url", *_project(request)), attempts=1)


def _project(request: Request) -> Command:
    return (f"--project={request.project}",) if request.project else ()
