"""What a machine does with the job: by its exit code, with its secrets, and with what is kept in the bucket (here a folder)."""

import base64
import http.server
import json
import os
import pathlib
import signal
import threading
import time

import pytest

from rlhf_jax.errors import CRASHED, DONE, MISTAKE, PREEMPTED, UserError
from rlhf_jax.launch import bucket, secrets, worker
from rlhf_jax.launch.worker import Verdicts, Worker

# A job: writes a line, counts its runs in a file, and ends with the next of its codes; "sleep" waits for SIGTERM and ends with 75.
JOB = """
import os, pathlib, signal, sys, time
runs = pathlib.Path("runs"); done = len(runs.read_text()) if runs.exists() else 0
runs.write_text("x" * (done + 1))
code = sys.argv[1:][min(done, len(sys.argv) - 2)]
print("run", done, os.environ["RUN_ID"], os.environ.get("TOKEN"), flush=True)
if code == "sleep":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    pathlib.Path("asleep").write_text("")
    time.sleep(60)
if code == "killed":
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
sys.exit(int(code))
"""


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    monkeypatch.setattr(worker, "pause", lambda failures: 0.001)
    monkeypatch.setattr(worker, "EVERY", 0.02)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def ready(folder, *codes, **changes):
    """A worker whose job ends with these codes, one after the other."""
    (folder / "code").mkdir()
    (folder / "code" / "job.py").write_text(JOB)
    job = {"run_id": "r1", "command": ["python", "-IS", "job.py", *map(str, codes)], "inputs": [], "mirror": "", "reports": str(folder / "bucket"),
           "secrets": {}, "max_restarts": 2, **changes}
    return Worker(job, folder)


def outcomes(folder):
    return [path.read_text().split()[1] for path in (folder / "bucket" / "outcome").glob("*")]


def runs(folder):
    return len((folder / "code" / "runs").read_text())


@pytest.mark.parametrize(
    ("codes", "code", "times"),
    [
        ((0,), DONE, 1),
        ((2,), MISTAKE, 1),
        ((75, 75, 75, 75, 0), DONE, 5),  # preemptions are not counted
        (("killed", 0), DONE, 2),
        ((1, 1, 0), DONE, 3),
        ((1, 75, 1, 134, 0), CRASHED, 4),
        ((1, 2), MISTAKE, 2),
    ],
)
def test_restarts_go_by_the_exit_code(tmp_path, codes, code, times):
    assert ready(tmp_path, *codes).run() == code
    assert runs(tmp_path) == times
    assert outcomes(tmp_path) == [str(code)]
    log = next((tmp_path / "bucket" / "logs").iterdir()).read_text()
    assert log == (tmp_path / worker.LOG).read_text() and all(f"run {n} r1" in log for n in range(times))


def test_an_hour_of_health_forgives_crashes():
    verdicts = Verdicts(max_restarts=1)
    assert [verdicts.after(1, 10.0), verdicts.after(1, worker.HEALTHY), verdicts.after(1, 10.0)] == [0.001, 0.001, None]


def test_a_machine_that_goes_down_lets_the_job_save_and_says_preempted(tmp_path):
    one = ready(tmp_path, "sleep", 0)

    def tell():
        while not (tmp_path / "code" / "asleep").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell).start()
    assert one.run() == PREEMPTED
    assert runs(tmp_path) == 1
    assert not (tmp_path / "bucket" / "outcome").exists()
    assert "ended with 75" in next((tmp_path / "bucket" / "logs").iterdir()).read_text()


def test_inputs_are_fetched_once_and_whole(tmp_path):
    (tmp_path / "far" / "rows").mkdir(parents=True)
    (tmp_path / "far" / "rows" / "a.jsonl").write_text("1\n")
    (tmp_path / "far" / "b.jsonl").write_text("2\n")
    inputs = [[str(tmp_path / "far" / "rows"), "../inputs/data.train/rows"], [str(tmp_path / "far" / "b.jsonl"), "../inputs/data.valid/b.jsonl"]]
    assert ready(tmp_path, 0, inputs=inputs).run() == DONE
    assert (tmp_path / "inputs/data.train/rows/a.jsonl").read_text() == "1\n"
    assert (tmp_path / "inputs/data.valid/b.jsonl").read_text() == "2\n"
    bucket.fetch(str(tmp_path / "none"), tmp_path / "inputs/data.valid/b.jsonl")  # there already
    with pytest.raises(UserError, match="no such file"):
        bucket.fetch(str(tmp_path / "none"), tmp_path / "new")


def test_an_input_that_is_not_there_is_a_mistake(tmp_path):
    assert ready(tmp_path, 0, inputs=[[str(tmp_path / "none"), "../inputs/x"]]).run() == MISTAKE
    assert not (tmp_path / "code" / "runs").exists() and outcomes(tmp_path) == ["2"]


# --- secrets ---


class Manager(http.server.BaseHTTPRequestHandler):
    """The metadata server and Secret Manager in one."""

    def do_GET(self) -> None:
        if self.path == "/token":
            legal, answer = self.headers["Metadata-Flavor"] == "Google", {"access_token": "t0"}
        else:
            legal = self.headers["Authorization"] == "Bearer t0" and self.path == "/projects/p/secrets/key/versions/latest:access"
            answer = {"payload": {"data": base64.b64encode(b"very secret").decode()}}
        self.send_response(200 if legal else 403)
        self.end_headers()
        self.wfile.write(json.dumps(answer if legal else {}).encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def manager(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Manager) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(secrets, "TOKEN", f"http://127.0.0.1:{server.server_port}/token")
        monkeypatch.setattr(secrets, "SERVICE", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


def test_a_secret_reaches_the_jobs_environment_and_no_file(tmp_path, manager):
    assert ready(tmp_path, 0, secrets={"TOKEN": "projects/p/secrets/key"}).run() == DONE
    assert "run 0 r1 ***\n" in (tmp_path / worker.LOG).read_text()  # the job printed it
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"very secret" in path.read_bytes()]
    assert "TOKEN" not in os.environ


def test_a_secret_that_may_not_be_read_is_a_mistake(manager):
    with pytest.raises(UserError, match=r"--secret other: .*secretAccessor"):
        secrets.values({"TOKEN": "projects/p/secrets/other"})


# --- the mirror of a pipeline's folder ---


def paths(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_new_machine_goes_on_with_what_the_last_one_had(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    first = bucket.Mirror(here, str(there))
    first.begin()
    for name in ("metrics.jsonl", "sft/checkpoints/1/state", "sft/checkpoints/2.orbax-checkpoint-tmp/state", "x.part"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    first.push()
    assert paths(there) == ["metrics.jsonl", "sft/checkpoints/1/state"]
    (here / "sft/checkpoints/1/state").unlink()
    (here / "sft/checkpoints/3").mkdir()
    (here / "sft/checkpoints/3/state").write_text("3")
    first.push()
    (there / "launch").mkdir()
    (there / "launch" / "job.json").write_text("{}")
    second = bucket.Mirror(tmp_path / "elsewhere", str(there))
    second.begin()
    assert paths(tmp_path / "elsewhere") == ["metrics.jsonl", "sft/checkpoints/3/state"]
    (tmp_path / "elsewhere" / "metrics.jsonl").unlink()
    second.push()
    assert paths(there) == ["launch/job.json", "sft/checkpoints/3/state"]


def test_a_log_is_never_behind_the_checkpoint_beside_it(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    mirror = bucket.Mirror(here, str(there))
    mirror.begin()
    (here / "run/checkpoints/1").mkdir(parents=True)
    (here / "run/checkpoints/1/state").write_text("1")
    (here / "run/metrics.jsonl").write_text("1\n")
    sent, write = [], pathlib.Path.write_bytes

    def record(path, content):
        sent.append(str(path.relative_to(there)))
        return write(path, content)

    monkeypatch.setattr(type(mirror.there), "write_bytes", record)
    mirror.push()
    assert sent == ["run/metrics.jsonl", "run/checkpoints/1/state"]
    mirror.push()
    assert len(sent) == 2  # nothing changed


def test_a_pipeline_killed_between_stages_goes_on_at_the_unfinished_one(tmp_path):
    """Two machines, one after the other; the first is told to end in the second stage."""
    stage = """
import os, pathlib, signal, sys
work = pathlib.Path("../work")
for name in ("one", "two"):
    if (work / name).exists():
        continue
    if name == "two" and sys.argv[1] == "first":
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()
    (work / name).write_text(sys.argv[1])
"""
    for machine, code in (("first", PREEMPTED), ("second", DONE)):
        (tmp_path / machine).mkdir()
        job = {"command": ["python", "-IS", "job.py", machine], "mirror": str(tmp_path / "kept"), "reports": str(tmp_path / "kept" / "launch")}
        one = ready(tmp_path / machine, **job)
        (tmp_path / machine / "code" / "job.py").write_text(stage)
        assert one.run() == code
    assert (tmp_path / "kept" / "one").read_text() == "first" and (tmp_path / "kept" / "two").read_text() == "second"
