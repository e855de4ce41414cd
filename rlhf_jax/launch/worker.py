"""What runs on every machine: the job, again and again as its exit code says, with its log and its outcome kept in the bucket.

    python -m rlhf_jax.launch.worker job.json

    | the job ended with       | what follows                                                                                      |
    |--------------------------|---------------------------------------------------------------------------------------------------|
    | 0 done                   | the outcome is written                                                                            |
    | 2 a mistake              | the outcome is written; a restart would not help                                                  |
    | 75, SIGTERM: preempted   | it is started again, unless this machine is going down itself: then exit 75, for whoever restarts |
    | anything else: a crash   | it is started again after 5, 10, 20 … 300 s, at most `max_restarts` times; an hour's run forgives |

The command is the same every time, and so are RUN_ID and workdir: it goes on from the last checkpoint. When one machine of several dies, the others
abort, and all of them meet again in `jax.distributed.initialize`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from rlhf_jax.errors import CRASHED, DONE, MISTAKE, PREEMPTED, UserError
from rlhf_jax.launch import bucket, secrets
from rlhf_jax.launch.backoff import pause

EVERY = 30.0  # seconds between two copies of the log
HEALTHY = 3600.0  # seconds of a run after which earlier crashes no longer count
TAIL = 8 * 2**20  # bytes of the log's end that the bucket gets
LOG = "worker.log"


@dataclasses.dataclass
class Verdicts:
    """What to do after the job has ended: counts crashes and preemptions in a row."""

    max_restarts: int
    crashes: int = 0
    preemptions: int = 0

    def after(self, code: int, seconds: float) -> float | None:
        """Seconds to wait before the job is started again, or None: it is not.

        Args:
          code: the job's exit code; negative for a signal.
          seconds: that it ran.
        """
        if code in (DONE, MISTAKE):
            return None
        if seconds >= HEALTHY:
            self.crashes = self.preemptions = 0
        if code in (PREEMPTED, -signal.SIGTERM, 128 + signal.SIGTERM):
            self.preemptions += 1
            return pause(self.preemptions)
        self.crashes += 1
        return pause(self.crashes) if self.crashes <= self.max_restarts else None


class Worker:
    """One machine's part.

    Args:
      job: job.json.
      folder: where it lies; `code/` and `inputs/` are beside it.
    """

    def __init__(self, job: Mapping[str, Any], folder: pathlib.Path) -> None:
        self.job, self.folder = job, folder
        self.host = socket.gethostname()
        self.reports = epath.Path(job["reports"])
        self.mirror = bucket.Mirror(folder / "work", job["mirror"]) if job["mirror"] else None
        self.child: subprocess.Popen[bytes] | None = None
        self.going_down = threading.Event()  # this machine was told to end
        self.hidden: tuple[bytes, ...] = ()  # values of secrets, never written

    def run(self) -> int:
        """Runs the job to its end; returns the exit code that says how it ended."""
        signal.signal(signal.SIGTERM, self._terminated)
        verdicts = Verdicts(self.job["max_restarts"])
        with self._reporting():
            while True:
                start = time.monotonic()
                code = self._attempt()
                wait = None if self.going_down.is_set() else verdicts.after(code, time.monotonic() - start)
                if wait is None:
                    break
                self.say(f"exit code {code}: again in {wait:g} s (crashes in a row: {verdicts.crashes} of {verdicts.max_restarts})")
                if self.going_down.wait(wait):
                    break
            if self.going_down.is_set() and code != DONE:
                code = PREEMPTED
            code = code if code in (DONE, MISTAKE, PREEMPTED) else CRASHED
            self.say(f"ended with {code}")
        if code != PREEMPTED:
            _stubbornly(lambda: self._write("outcome", f"{self.host} {code}\n".encode()))
        return code

    def say(self, text: str) -> None:
        """A line of the log."""
        self._log(f"[launch {time.strftime('%F %T')}] {text}\n".encode())

    def _attempt(self) -> int:
        """One run of the command, its inputs and secrets fetched before; returns its exit code."""
        try:
            for source, target in self.job["inputs"]:
                bucket.fetch(source, self.folder / "code" / target)
            if self.mirror:
                self.mirror.begin()
            values = secrets.values(self.job["secrets"])
        except UserError as mistake:
            self.say(str(mistake))
            return MISTAKE
        except Exception as error:  # of the network: tried again like a crash
            self.say(f"{type(error).__name__}: {error}")
            return CRASHED
        self.hidden = tuple(value.encode() for value in values.values() if value)
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
        names = {"RUN_ID": self.job["run_id"], "WANDB_RUN_ID": self.job["run_id"], "PYTHONUNBUFFERED": "1", "PATH": path}
        self.say(" ".join(self.job["command"]))
        self.child = subprocess.Popen(self.job["command"], cwd=self.folder / "code", env={**os.environ, **names, **values},
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if self.going_down.is_set():  # told while it was starting
            self.child.terminate()
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self._log(line)
        return self.child.wait()

    def _terminated(self, number: int, frame: object) -> None:
        """SIGTERM: this machine is going down; the job saves its state and ends."""
        self.going_down.set()
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()

    def _log(self, line: bytes) -> None:
        for value in self.hidden:
            line = line.replace(value, b"***")
        with open(self.folder / LOG, "ab") as stream:
            stream.write(line)
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Copies the log and a pipeline's folder to the bucket now and then, and at the end."""
        ended = threading.Event()

        def loop() -> None:
            while not ended.wait(EVERY):
                self._report()

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            _stubbornly(self._report_all)

    def _report(self) -> None:
        try:
            self._report_all()
        except Exception as error:  # the next copy may succeed; the run goes on
            self.say(f"{type(error).__name__} while reporting: {error}")

    def _report_all(self) -> None:
        if (self.folder / LOG).exists():
            self._write("logs", (self.folder / LOG).read_bytes()[-TAIL:])
        if self.mirror and self.mirror.here.exists():
            self.mirror.push()

    def _write(self, kind: str, content: bytes) -> None:
        target = self.reports / kind / self.host
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _stubbornly(action: Callable[[], None], attempts: int = 5) -> None:
    """Does what must not be lost to a passing fault of the network."""
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except Exception:
            if attempt == attempts:
                raise
            time.sleep(pause(attempt))


def main(path: str) -> int:
    """Runs the job that this file describes; returns the exit code."""
    file = pathlib.Path(path).resolve()
    return Worker(json.loads(file.read_text()), file.parent).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
