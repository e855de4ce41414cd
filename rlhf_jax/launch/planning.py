"""From a request and a config to a plan: a pure function, whose result is printed or run."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from rlhf_jax.launch import cloud, job, queued, sky, tpu_vm, xpk
from rlhf_jax.launch.plan import Plan
from rlhf_jax.launch.request import Request, check, check_config, check_identity

BACKENDS: dict[str, ModuleType] = {"queued": queued, "tpu-vm": tpu_vm, "xpk": xpk, "sky": sky}
ACTIONS = {
    "start": "start the run and watch it to its end",
    "status": "the state of the machines, and the outcome of each process that has ended",
    "logs": "the logs of all machines, from the bucket; --live reads them on the machines",
    "stop": "end the run and delete its machines; its workdir stays, and `start` goes on from there",
}


def start(request: Request, config: Mapping[str, Any] | None, *, detach: bool = False) -> Plan:
    """Ships the job, asks for machines, watches, and cleans up.

    Args:
      request: what is asked for.
      config: plain and checked; None for an experiment.
      detach: end when the machines are asked for.

    Raises:
      UserError: anything that cannot work.
    """
    check(request)
    if config is not None:
        check_config(request, config)
    backend = BACKENDS[request.backend]
    slice_ = request.topology
    slices = f"{request.slices} slices of " if request.slices > 1 else ""
    title = (f"{request.name} on {request.backend}: {slices}{slice_.name} ({slice_.accelerator}), chips: {slice_.chips * request.slices}, "
             f"hosts: {request.processes}, {'spot' if request.spot else 'on demand'}; everything goes to {request.workdir}")
    files = (*job.files(request, config), *backend.files(request))
    steps = (*backend.prepare(request), *backend.create(request))
    if detach:
        return Plan(title, files, steps)
    if hasattr(backend, "wait"):  # it restarts the run and gives its machines back by itself
        return Plan(title, files, steps, wait=backend.wait(request), outcomes=cloud.outcomes(request))
    return Plan(title, files, steps, watch=backend.watch(request), outcomes=cloud.outcomes(request),
                clean_up=() if request.keep else backend.delete(request), crashes=request.max_restarts, preemptions=request.max_preemptions)


def act(request: Request, action: str, *, live: bool = False) -> Plan:
    """`status`, `logs` or `stop` of a run that was started.

    Args:
      request: what identifies it: backend, name, project, zone, cluster, workdir.
      action: one of ACTIONS but "start".
      live: read the logs on the machines.

    Raises:
      UserError: a flag that it takes to find the run is missing.
    """
    check_identity(request, in_bucket=action == "status" or (action == "logs" and not live))
    backend = BACKENDS[request.backend]
    steps = {
        "status": lambda: backend.status(request),
        "logs": lambda: (backend.live_logs(request) if live else cloud.logs(request),),
        "stop": lambda: backend.delete(request),
    }[action]()
    return Plan(f"{action} {request.name} on {request.backend}", (), steps)
