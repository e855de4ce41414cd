"""Two processes are one: the same metrics, samples, checkpoints and state, bit for bit; refused together, killed and resumed (Gloo on CPU).

Each process has one device, the one that they are compared with has two: a sum of two numbers has one order. Processes start and compile once for all
that a test here looks at.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import signal
import subprocess
import time
from typing import Any

import pytest

from rlhf_jax import checkpoint
from rlhf_jax.train.watchdog import HUNG
from tests.train.hosts import MESH, all_of, free_port, start, trained
from tests.train.runs import arguments, metrics, outcome, rows, series, steps

UNEVEN = {"run.steps": 4, "checkpoint.every": 2, "validation.every": 3, "optimizer.lr": 3e-3}
OFFLINE = {**UNEVEN, "run.steps": 3, "run.microbatches": 1}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {**UNEVEN, "kill": [1, 4, "training"]}),  # on the second host, after the checkpoint of step 2 and the validation of step 3
    "reward": ("reward", OFFLINE),  # its checkpoint holds the mean of scores of all hosts
    "dpo": ("dpo", {**OFFLINE, "validation.every": 0}),
    # A Python reward: each host asks about its own rows.
    "ppo": ("ppo", {**OFFLINE, "validation.every": 0, "data.valid": "", "critic.kind": "shared", "critic.init_from": "", "log.samples": 8}),
}
ONLINE = {**UNEVEN, "log.samples": 8}
BPE = {"tokenizer.kind": "bpe", "tokenizer.vocab_size": 264}
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "bpe": ("reward", {**OFFLINE, **BPE}),
    "fused": ("ppo", {**ONLINE, "reward_fn": "", "reward_from": "@reward", "reward_normalise": True}),
    "ahead": ("grpo", {**ONLINE, "objective.correction": "token_truncate", "schedule.ahead": 2, "schedule.replay": 0.5, "schedule.capacity": 8}),
    "refill": ("dapo", {**ONLINE, "schedule.refill": 2}),
    # On two hosts the same rows: both go by what the first one's reward says.
    "tensor": ("grpo", {**ONLINE, "mesh.fsdp": 1, "mesh.tensor": 2, "model.kv_heads": 2}),
    # A reward model of another tokenizer reads all rows on all hosts, beside a function that fails on some rows.
    "retokenised": ("ppo", {**ONLINE, "log.samples": 2, "reward_fn": "", "reward_failure.policy": "mask", "reward_normalise": False, "rewards": [
        {"name": "learned", "run": "@bpe", "normalise": "stored", "weight": 0.5}, {"name": "tests.train.hosts.picky", "weight": 1.0}]}),
    "kto": ("kto", OFFLINE),  # a row's neighbour may be another host's
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {  # what one host has otherwise, and what both say
    "config": ({"host 1": {"optimizer.lr": 2e-3}}, "host 1 of 2 differs from host 0 in config.optimizer.lr (0.002 there, 0.003 on host 0): start"),
    "file": ({"host 1": {"data.train": "nowhere.jsonl"}}, "host 1 of 2: config.data.train = 'nowhere.jsonl': no such file or folder"),
    "same": ({"run.steps": 0}, "config.run.steps = 0 and config.run.data_epochs = 0: set exactly one of them"),
    "devices": ({"mesh.devices": 1}, "config.mesh.devices = 1 leaves a host of 2 without a device: set it to 0"),
    "workdir": ({}, "host 1 of 2 does not see what host 0 writes there: name a folder that all hosts share"),
}


def same_end(found: pathlib.Path, expected: pathlib.Path) -> None:
    left, right = outcome(found), outcome(expected)
    assert left.keys() == right.keys() and "final.json" in left
    for name, content in right.items():
        assert left[name] == content, f"{found.name}/{name} differs"
    for folder in ("checkpoints", "best"):
        assert (found / folder).exists() == (expected / folder).exists()
        assert not (expected / folder).exists() or steps(found / folder) == steps(expected / folder)
    (params, meta), (same, other) = (checkpoint.load_params(str(folder), key="latest") for folder in (found, expected))
    assert checkpoint.tree_digest(params) == checkpoint.tree_digest(same)
    own = ("checkpoint", "fingerprint")  # its path; digests of leaves that span hosts are left out of it
    assert {key: value for key, value in meta.items() if key not in own} == {key: value for key, value in other.items() if key not in own}


def whole(jobs: dict[str, tuple[str, dict[str, Any]]], folder: pathlib.Path, hosts: int) -> list[Any]:
    """The jobs without kills; "@NAME" stands for the workdir of another."""
    text = json.dumps({name: (config, {key: value for key, value in changes.items() if key != "kill"}) for name, (config, changes) in jobs.items()})
    found = json.loads(re.sub(r'"@(\w+)"', lambda match: json.dumps(str(folder / f"{hosts} {match[1]}")), text))
    return [(config, changes, folder / f"{hosts} {name}") for name, (config, changes) in found.items()]


def done(processes: list[subprocess.CompletedProcess[str]]) -> None:
    for process in processes:
        assert process.returncode == 0 and "refused" not in process.stdout, process.stdout + process.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def killed(folder: pathlib.Path) -> list[subprocess.CompletedProcess[str]]:
    """Refusals, and then a run whose second process is killed."""
    quick = {"mesh.heartbeat": 15}  # until the survivor notices; on a busy machine a living process may be silent for 10 s
    places = {name: [str(folder / name / host) for host in "01"] for name in REFUSED}
    refused = [("sft", {**UNEVEN, **quick, **changes}, places[name]) for name, (changes, _) in REFUSED.items()]
    return trained([*refused, ("sft", {**JOBS["sft"][1], **quick}, str(folder / "2 sft"))], 2)


@pytest.fixture(scope="module")
def two(folder: pathlib.Path, killed: Any) -> pathlib.Path:
    """All jobs, the first one from where it was killed."""
    done(trained(whole(JOBS, folder, 2), 2))
    return folder


@pytest.fixture(scope="module")
def one(folder: pathlib.Path, two: Any) -> pathlib.Path:
    done(trained(whole(JOBS, folder, 1), 1))
    return folder


@pytest.mark.parametrize(("line", "name"), list(enumerate(REFUSED)))
def test_hosts_that_differ_stop_together_with_one_sentence(line: int, name: str, killed: Any, folder: pathlib.Path) -> None:
    said = [[text for text in process.stdout.split("\n") if text.startswith("refused: ")] for process in killed]
    assert len(said[0]) == len(said[1]) == len(REFUSED), killed[0].stdout + killed[0].stderr
    for host in range(2):
        assert REFUSED[name][1] in said[host][line]
    assert said[0][line].replace("/workdir/0", "") == said[1][line].replace("/workdir/1", "")
    assert not (folder / name / "0" / "checkpoints").exists()


def test_a_killed_host_ends_the_others(killed: Any, folder: pathlib.Path) -> None:
    first, second = killed
    assert second.returncode == -signal.SIGKILL and first.returncode not in (0, 2, HUNG)
    assert not (folder / "2 sft" / "final.json").exists()


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_are_one(name: str, two: pathlib.Path, one: pathlib.Path) -> None:
    same_end(two / f"2 {name}", one / f"1 {name}")


def test_what_was_compared_says_something(one: pathlib.Path, two: pathlib.Path) -> None:
    assert len(metrics(two / "2 sft")) == 6 and steps(two / "2 sft" / "checkpoints") == [2, 4]
    assert "reward_mean" in checkpoint.load_params(str(two / "2 reward"), key="latest")[1]
    losses = {name: series(two / f"2 {name}", "loss") for name in JOBS}
    assert all(len(set(values)) == len(values) for values in losses.values())
    assert len({tuple(values) for values in losses.values()}) == len(JOBS)
    assert len(outcome(two / "2 ppo")["samples.jsonl"].split(b"\n")) == 3 * 8 + 1


# --- minutes ---


@pytest.fixture(scope="module")
def more(two: pathlib.Path, one: pathlib.Path) -> pathlib.Path:
    for hosts in (2, 1):
        done(trained(whole(SLOW, one, hosts), hosts, timeout=1200.0))
    return one


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_are_one_in_more_ways(name: str, more: pathlib.Path) -> None:
    if name == "retokenised":
        assert any("failed" in row for row in rows(more / "2 retokenised" / "samples.jsonl"))
    same_end(more / f"2 {name}", more / f"1 {name}")


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(two: pathlib.Path, one: pathlib.Path) -> None:
    run = two / "1 after 2"
    shutil.copytree(two / "2 sft", run)
    for gone in (run / "checkpoints" / "4", run / "best"):
        shutil.rmtree(gone)
    (run / "final.json").unlink()
    done(trained([(config, changes, run) for config, changes, _ in whole({"sft": JOBS["sft"]}, two, 1)], 1))
    same_end(run, one / "1 sft")


@pytest.mark.slow
def test_two_processes_of_two_devices_are_one_of_four_to_rounding(folder: pathlib.Path) -> None:
    jobs = {"four": ("sft", {**UNEVEN, "run.batch_size": 8, "mesh.data": 2, "model.context": 64})}
    for hosts in (2, 1):
        done(trained(whole(jobs, folder, hosts), hosts, devices=4))
    found, expected = (metrics(folder / f"{hosts} four") for hosts in (2, 1))
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    assert [list(line.values()) for line in found] == [pytest.approx(list(line.values()), rel=1e-4, abs=1e-6) for line in expected]


@pytest.mark.slow
def test_a_stuck_reward_of_one_host_ends_both(folder: pathlib.Path) -> None:
    changes = {**JOBS["ppo"][1], "reward_fn": "tests.train.hosts.stuck", "run.watchdog": 8.0}
    ended = trained([("ppo", changes, folder / "stuck")], 2)
    assert [process.returncode for process in ended] == [HUNG, HUNG], [process.stderr for process in ended]
    assert all("a step at step 3 has not ended after 8 s" in process.stderr for process in ended)
    assert "in stuck" in ended[1].stderr and "in stuck" not in ended[0].stderr


@pytest.mark.slow
def test_preempted_together(two: pathlib.Path, one: pathlib.Path) -> None:
    """SIGTERM to one host: both save at one step and end with 75; the same command ends as the run that nobody disturbed."""
    run, port = two / "preempted", free_port()
    ((_, changes, _),) = whole({"sft": JOBS["sft"]}, two, 2)
    command = ["-m", "rlhf_jax.cli.main", "train", *arguments("sft", {**MESH, **changes, "mesh.multihost": True}, run)]
    started = [start(command, index, 2, port) for index in range(2)]
    while not (run / "metrics.jsonl").exists() and all(process.poll() is None for process in started):
        time.sleep(0.02)
    started[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [75, 75], said
    assert "preempted at step" in said[0][0] and "preempted" not in said[1][0]
    done(all_of([command] * 2))
    same_end(run, one / "1 sft")
