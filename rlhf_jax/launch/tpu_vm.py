"""Plain TPU VMs: one slice, now or not at all; while there is no room, it is asked for again and again with growing pauses.

    gcloud compute tpus tpu-vm create NAME …

A preempted spot VM stays in the list as PREEMPTED and cannot be started again: it is deleted and made anew. See docs.cloud.google.com/tpu/docs/spot
and the states of a node in docs.cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes.
"""

from __future__ import annotations

from rlhf_jax.launch import cloud
from rlhf_jax.launch.plan import Command, Step, Watch
from rlhf_jax.launch.request import Request

GCLOUD = ("gcloud", "compute", "tpus", "tpu-vm")
PATIENCE = 100  # tries to create; from the eighth on they are five minutes apart
files, prepare = cloud.files, cloud.prepare


def create(request: Request) -> tuple[Step, ...]:
    """Makes the machines."""
    command = (*GCLOUD, "create", request.name, *cloud.place(request), *cloud.machine(request, "version"))
    return (cloud.forget(request), Step("make the machines", command, attempts=PATIENCE))


def delete(request: Request) -> tuple[Step, ...]:
    """Gives the machines back."""
    return (Step("delete the machines", (*GCLOUD, "delete", request.name, *cloud.place(request), "--quiet")),)


def state(request: Request) -> Command:
    """Prints the state in one word."""
    return (*GCLOUD, "describe", request.name, *cloud.place(request), "--format=value(state)")


def watch(request: Request) -> Watch:
    """States: CREATING, READY, RESTARTING, REPAIRING; PREEMPTED when preempted; STOPPED and TERMINATED when someone else ended it."""
    return Watch(state(request), lost=("PREEMPTED",), failed=("STOPPED", "TERMINATED"), processes=request.processes,
                 recover=(*delete(request), *create(request)))


def status(request: Request) -> tuple[Step, ...]:
    """The state, and outcomes if any."""
    return cloud.status(request, state(request))


def live_logs(request: Request) -> Step:
    """The end of the log of every machine, read over ssh."""
    command = (*GCLOUD, "ssh", request.name, *cloud.place(request), "--worker=all", f"--command={cloud.tail(request)}")
    return Step("the end of the log of every machine", command, attempts=1)
