"""The generated shell scripts: their syntax, and a machine that runs them, with `gcloud`, Python's `venv` and the job faked."""

import json
import os
import subprocess
import sys

import pytest

from rlhf_jax.launch import planning
from tests.launch.asked import ROOT, config, request
from tests.launch.fakes import Tools, tools  # noqa: F401

# `python3 -m venv … environment` puts a Python there whose pip does nothing and whose worker does not wait; all else is Python.
PYTHON3 = """#!/usr/bin/env bash
if [ "$1 $2" != "-m venv" ]; then exec {python} "$@"; fi
mkdir -p environment/bin
cat > environment/bin/python <<'END'
#!/usr/bin/env bash
case "$*" in
  "-m pip "*) echo "$@" >> pip.calls; test -f requirements.txt && test "$(wc -l < pip.calls)" -gt {failures} ;;
  "-m rlhf_jax.launch.worker job.json") exec {python} -c 'import os, sys; from rlhf_jax.launch import worker
sys.executable, worker.pause = os.path.abspath("environment/bin/python"), lambda n: 0.001
sys.exit(worker.main("job.json"))' ;;
  *) exec {python} "$@" ;;
esac
END
chmod +x environment/bin/python
ln -sf {tools}/rlhf-jax environment/bin/rlhf-jax
"""
JOB = """#!{python} -IS
import os, sys
with open("{folder}/codes") as stream:
    codes = stream.read().split()
with open("{folder}/codes", "w") as stream:
    stream.write(" ".join(codes[1:]))
print(sys.argv[1:], os.environ["RUN_ID"], flush=True)
sys.exit(int(codes[0]))
"""


def write(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path, tools):  # noqa: F811
    """A function that runs `run.sh` on a machine whose job ends with the given codes."""

    def boot(codes, failures=0, **changes):
        folder = tmp_path / "job"
        folder.mkdir(exist_ok=True)
        for file in planning.start(request(**changes), config()).files:
            if "/job/" in file.path:
                (folder / file.path.rpartition("/")[2]).write_text(file.text)
        job = json.loads((folder / "job.json").read_text())
        (folder / "job.json").write_text(json.dumps({**job, "reports": str(tmp_path / "bucket"), "inputs": []}))
        (tmp_path / "codes").write_text(" ".join(map(str, codes)))
        write(tools.folder / "python3", PYTHON3.format(python=sys.executable, failures=failures, tools=tools.folder))
        write(tools.folder / "rlhf-jax", JOB.format(python=sys.executable, folder=tmp_path))
        write(tools.folder / "sleep", "#!/bin/sh\n")
        ended = subprocess.run(["bash", str(folder / "run.sh")], check=False, capture_output=True, text=True, timeout=60, cwd="/",
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
        outcome = [path.read_text().split()[1] for path in (tmp_path / "bucket" / "outcome").glob("*")]
        return ended, outcome, (tmp_path / "codes").read_text().split()

    return boot


@pytest.mark.parametrize("backend", list(planning.BACKENDS))
def test_syntax(backend, tmp_path):
    made = [file for file in planning.start(request(backend=backend), config()).files if file.path.endswith(".sh")]
    assert made
    for file in made:
        assert subprocess.run(["bash", "-n"], check=False, input=file.text, text=True).returncode == 0


def test_the_job_is_restarted_after_a_preemption_and_a_crash(machine):
    ended, outcome, left = machine([75, 1, 75, 0, 9])
    assert ended.returncode == 0, ended.stderr
    assert outcome == ["0"] and left == ["9"]
    command = "['train', '--config', '../config.py', '--workdir', 'gs://bucket/runs/ppo-1'] ppo-1"
    assert ended.stdout.count(command) == 4


def test_a_mistake_stops_it(machine):
    ended, outcome, left = machine([2, 0])
    assert (ended.returncode, outcome, left) == (2, ["2"], ["0"])


def test_crashes_are_capped(machine):
    ended, outcome, left = machine([1, 1, 1, 0], max_restarts=2)
    assert (ended.returncode, outcome, left) == (1, ["1"], ["0"])


def test_set_up_is_tried_again_and_done_once(machine, tmp_path):
    ended, outcome, _ = machine([0], failures=1)
    assert ended.returncode == 0 and "again in 5 s" in ended.stderr and outcome == ["0"]
    assert len((tmp_path / "job" / "pip.calls").read_text().splitlines()) == 2
    machine([0])
    assert len((tmp_path / "job" / "pip.calls").read_text().splitlines()) == 2  # a reboot
    machine([0], code="rlhf-jax==0.1.0")
    assert len((tmp_path / "job" / "pip.calls").read_text().splitlines()) == 3  # other code


@pytest.mark.parametrize("backend", ["queued", "tpu-vm"])
def test_the_start_up_script_fetches_the_job_until_it_can_and_runs_it_in_a_unit(backend, tmp_path, tools):  # noqa: F811
    script = planning.start(request(backend=backend), config()).files[-1].text
    home = "/var/lib/rlhf-jax/ppo-1/job"
    assert script.count(home) == 1
    tools.add("gcloud", (("storage",), [(1, ""), (0, "")]))
    tools.add("systemd-run")
    tools.add("sleep")
    ended = subprocess.run(["bash", "-c", script.replace(home, str(tmp_path / "job"))], check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and (tmp_path / "job").is_dir()
    assert tools.calls("gcloud") == [["storage", "cp", "--recursive", "gs://bucket/runs/ppo-1/launch/job/*", f"{tmp_path}/job/"]] * 2
    assert tools.calls("sleep") == [["5"]]
    assert tools.calls("systemd-run") == [["--unit=rlhf-jax-ppo-1", "--collect", "--setenv=HOME=/root", "--property=KillMode=mixed",
                                           "--property=TimeoutStopSec=300", "bash", f"{tmp_path}/job/run.sh"]]
