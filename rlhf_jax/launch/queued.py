"""Queued resources: Google's advice for TPU VMs, and the only way to several slices without Kubernetes.

    gcloud compute tpus queued-resources create NAME --node-id=NAME …             one slice
    gcloud compute tpus queued-resources create NAME --node-count=N --node-prefix=NAME …

A spot resource that was preempted ends as SUSPENDED and never comes back: it is deleted and asked for again. See
docs.cloud.google.com/tpu/docs/queued-resources (states) and …/tpu/docs/spot.
"""

from __future__ import annotations

from rlhf_jax.launch import cloud
from rlhf_jax.launch.plan import Command, Step, Watch
from rlhf_jax.launch.request import Request

GCLOUD = ("gcloud", "compute", "tpus", "queued-resources")
files, prepare = cloud.files, cloud.prepare


def create(request: Request) -> tuple[Step, ...]:
    """Asks for the machines, and returns at once: they may come in hours."""
    nodes = ((f"--node-id={request.name}",) if request.slices == 1
             else (f"--node-count={request.slices}", f"--node-prefix={request.name}"))
    command = (*GCLOUD, "create", request.name, *nodes, *cloud.place(request), *cloud.machine(request, "runtime-version"), "--async")
    return (cloud.forget(request), Step("queue for the machines", command))


def delete(request: Request) -> tuple[Step, ...]:
    """Gives the machines back, or leaves the queue."""
    return (Step("delete the machines", (*GCLOUD, "delete", request.name, *cloud.place(request), "--force", "--quiet")),)


def state(request: Request) -> Command:
    """Prints the state in one word."""
    return (*GCLOUD, "describe", request.name, *cloud.place(request), "--format=value(state.state)")


def watch(request: Request) -> Watch:
    """States: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE; then SUSPENDING, SUSPENDED when preempted, or FAILED."""
    return Watch(state(request), lost=("SUSPENDING", "SUSPENDED"), failed=("FAILED",), processes=request.processes,
                 recover=(*delete(request), *create(request)))


def status(request: Request) -> tuple[Step, ...]:
    """The state, and outcomes if any."""
    return cloud.status(request, state(request))


def live_logs(request: Request) -> Step:
    """The end of the log of every machine, read over ssh."""
    command = (*GCLOUD, "ssh", request.name, *cloud.place(request), "--node=all", "--worker=all", f"--command={cloud.tail(request)}")
    return Step("the end of the log of every machine", command, attempts=1)
