"""xpk: a JobSet on a GKE cluster that `xpk cluster create` made. Flags as in xpk 1.16.0.

    xpk workload create --workload=NAME --cluster=C --tpu-type=v5litepod-16 --base-docker-image=IMAGE --script-dir=DIR --command='bash run.sh' …

xpk adds `job/` to the image and runs the command in a container on every machine. Kubernetes restarts the whole JobSet after exit code 75
(`--restart-on-exit-codes`, beside its own 42 and 127 to 255) and after a lost node, at most `--max-restarts` times; 1 and 2 end it. So preemptions
are Kubernetes' part and crashes the worker's. xpk has no flag for Kubernetes secrets (`--env-file` copies values into the manifest), so secrets
come from Secret Manager through Workload Identity.
"""

from __future__ import annotations

from rlhf_jax.launch import cloud, job
from rlhf_jax.launch.plan import File, Step
from rlhf_jax.launch.request import Request

IMAGE = "python:3.12"
GRACE = 300  # seconds between SIGTERM and SIGKILL, in which the state is saved


def files(request: Request) -> tuple[File, ...]:
    """Beside the job: nothing."""
    return ()


def prepare(request: Request) -> tuple[Step, ...]:
    """Once, before the workload."""
    return cloud.pack(request)


def where(request: Request) -> tuple[str, ...]:
    """The cluster."""
    return (f"--cluster={request.cluster}", *cloud.place(request))


def create(request: Request) -> tuple[Step, ...]:
    """Builds the image and submits the workload."""
    command = ("xpk", "workload", "create", f"--workload={request.name}", *where(request), f"--tpu-type={request.topology.xpk_type}",
               f"--num-slices={request.slices}", f"--base-docker-image={request.image or IMAGE}", f"--script-dir={job.folder(request)}",
               "--command=bash run.sh", f"--max-restarts={request.max_preemptions}", "--restart-on-exit-codes=75",
               f"--termination-grace-period-seconds={GRACE}", *(("--spot",) if request.spot else ()))
    return (cloud.forget(request), Step("submit the workload", command, attempts=2))


def delete(request: Request) -> tuple[Step, ...]:
    """Deletes the workload; the cluster stays."""
    return (Step("delete the workload", ("xpk", "workload", "delete", f"--workload={request.name}", *where(request), "--force")),)


def wait(request: Request) -> Step:
    """Returns when the JobSet has ended, however it ended."""
    return Step("wait for its end", ("xpk", "workload", "list", *where(request), f"--wait-for-job-completion={request.name}"))


def status(request: Request) -> tuple[Step, ...]:
    """What xpk knows, and outcomes if any."""
    listed = ("xpk", "workload", "list", *where(request), f"--filter-by-job={request.name}")
    return cloud.status(request, listed)


def live_logs(request: Request) -> Step:
    """The end of the log of every container; needs the cluster's credentials, which xpk has fetched."""
    command = ("kubectl", "logs", f"--selector=jobset.sigs.k8s.io/jobset-name={request.name}", "--prefix", "--tail=100",
               f"--max-log-requests={request.processes}")
    return Step("the end of the log of every machine", command, attempts=1)
