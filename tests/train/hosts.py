"""One process of a run of several: `python -m tests.train.hosts JOBS`, JOBS a JSON list of [config, changes, workdir], trained in their order.

They share one start of JAX, which takes longer than training. A job that ends with a UserError prints its sentence. Changes under the key "host 1"
are that host's alone, and so is each of several workdirs; "kill" is [host, n, point]: SIGKILL at the n-th call of a point of tests.train.killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 2  # of all processes together: a sum of two numbers has one order, so that one process and two round alike
MESH = {"mesh.data": 1, "mesh.fsdp": -1, "mesh.devices": 0}
Job = tuple[str, Mapping[str, Any], Any]


def start(command: Sequence[str], index: int, hosts: int, port: int, devices: int = DEVICES) -> subprocess.Popen[str]:
    """Process `index` of `hosts`, which share the devices: `python COMMAND…`."""
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices // hosts}", os.environ["XLA_FLAGS"])
    flags += " --xla_cpu_use_fusion_emitters=false"  # compiles in two thirds of the time
    several = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(hosts), "JAX_PROCESS_ID": str(index)} if hosts > 1 else {}
    environment = {**os.environ, "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "2", "GLIBC_TUNABLES": "", **several}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def all_of(commands: Sequence[Sequence[str]], timeout: float = 300.0, devices: int = DEVICES) -> list[subprocess.CompletedProcess[str]]:
    """Runs one process per command to the end, as the hosts of one run."""
    port = free_port()
    started = [start(command, index, len(commands), port, devices) for index, command in enumerate(commands)]
    try:
        said = [process.communicate(timeout=timeout) for process in started]
        return [subprocess.CompletedProcess(process.args, process.returncode, *texts) for process, texts in zip(started, said)]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


def commands(jobs: Sequence[Job], hosts: int) -> list[list[str]]:
    """What each host is started with to do all jobs."""
    shared = {**MESH, "mesh.multihost": hosts > 1}
    return [["-m", "tests.train.hosts", json.dumps([(name, {**shared, **changes}, workdir) for name, changes, workdir in jobs], default=str)]] * hosts


def trained(jobs: Sequence[Job], hosts: int, **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """All jobs on `hosts` processes."""
    return all_of(commands(jobs, hosts), **options)


def picky(prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any]) -> list[float]:
    """A reward that fails on some rows, by what they say."""
    return [float("nan") if sum(map(ord, text)) % 3 == 0 else len(text) / 8 for text in responses]


_calls = [0]


def stuck(prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any]) -> list[float]:
    """A reward that the second host never gets in the third iteration."""
    _calls[0] += 1
    if _calls[0] == 3 and os.environ["JAX_PROCESS_ID"] == "1":
        time.sleep(600)
    return [float(len(text)) for text in responses]


def main(jobs: Sequence[Job]) -> None:
    import jax

    from rlhf_jax.errors import UserError
    from rlhf_jax.train import agreement
    from rlhf_jax.train.loop import train
    from tests.train.killed import POINTS, before
    from tests.train.runs import tiny

    jax.config.update("jax_numpy_rank_promotion", "raise")
    agreement.PATIENCE = 0.5
    index = os.environ.get("JAX_PROCESS_ID", "0")
    for name, given, folders in jobs:
        changes = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if not key.startswith(("host ", "kill"))}
        workdir = folders if isinstance(folders, str) else folders[int(index)]
        if "kill" in given and given["kill"][0] == int(index):
            _, number, point = given["kill"]
            before(*POINTS[point], number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            train(tiny(name, {**changes, **given.get(f"host {index}", {})}), workdir)
        except UserError as error:
            print("refused:", error, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
