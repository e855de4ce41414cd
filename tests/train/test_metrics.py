"""The log: deterministic lines, nothing that waits for the newest step, and a cut that makes a resumed log equal to an unbroken one."""

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.train import metrics as m
from rlhf_jax.train.metric_names import METRICS, describe, is_standard
from rlhf_jax.train.metrics import MetricsLog, cut_back, read_metrics
from rlhf_jax.types import Mean
from tests.house import house


def log(workdir, start=0, total=100, every=1, **options) -> MetricsLog:
    options = {"tensorboard": False, "wandb": None, "console": False} | options
    return MetricsLog(workdir, start_step=start, total_steps=total, every=every, **options)


def values(step):
    """What a step may return: means, scalars of several dtypes, in no particular order."""
    return {
        "policy/ratio_max": jnp.bfloat16(1.5),
        "loss/sft": Mean(jnp.float32(step), jnp.float32(3)),
        "optimizer/skipped": jnp.int32(step),
        "data/tokens": jnp.int32(2**24 + 1),
    }


def lines(workdir, name=m.METRICS_FILE):
    return (workdir / name).read_text().splitlines()


# --- the table ---


def test_table_and_wildcards():
    assert is_standard("objective/kl") and "nats" in describe("objective/kl")
    assert describe("loss/simpo") == METRICS["loss/*"] and describe("reward/format") == METRICS["reward/*"]
    assert describe("reward/margin") == METRICS["reward/margin"], "an exact name beats a wildcard"
    assert describe("eval/reward/accuracy") == f"on held-out data: {METRICS['reward/accuracy']}"
    assert describe("eval/gold") == METRICS["eval/*"]
    for name in ("kl", "objective/clipfrac", "policy/", "evaluation/loss"):
        assert not is_standard(name) and describe(name) is None
    assert all("[" in meaning and "\n" not in meaning for name, meaning in METRICS.items()), "every entry names its unit"


# --- lines ---


def test_every_name_of_the_table_is_logged_somewhere():
    """As a string of the sources, or, where a part of it varies, as the beginning of one."""
    words, beginnings = set(), set()
    for name, module in house().items():
        if name != "rlhf_jax.train.metric_names":
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    words.add(node.value)
                if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                    beginnings.add(node.values[0].value)
    counted = {f"env/{word}" for word in words}  # an environment names what it counts without the room
    missing = [name for name in METRICS if not (name.removesuffix("*") in beginnings if "*" in name else name in words | counted)]
    assert not missing


def test_lines_are_sorted_exact_and_deterministic(tmp_path):
    for run in ("a", "b"):
        with log(tmp_path / run) as writer:
            writer.write(1, values(1))
            writer.write(2, {"x": jnp.float32(0.1), "loss/a": Mean(jnp.float32(0), jnp.float32(0)), "b": jnp.array(True)})
    a, b = ((tmp_path / run / m.METRICS_FILE).read_bytes() for run in ("a", "b"))
    assert a == b
    assert lines(tmp_path / "a") == [
        '{"step": 1, "data/tokens": 16777217, "loss/sft": 0.33333334, "optimizer/skipped": 1, "policy/ratio_max": 1.5}',
        '{"step": 2, "b": 1, "loss/a": 0.0, "x": 0.1}',
    ]


def test_floats_round_trip_and_lines_are_strict_json(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 2**32, 200, dtype=np.uint32).view(np.float32)
    numbers = np.concatenate([numbers, np.float32([0, -0.0, 1e-45, 3.4028235e38, 1e16, np.nan, np.inf, -np.inf])])
    with log(tmp_path) as writer:
        writer.write(1, {f"x{i:03}": x for i, x in enumerate(numbers)})
    strict = json.loads(lines(tmp_path)[0], parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert [strict[f"x{i:03}"] for i in range(len(numbers) - 3, len(numbers))] == ["nan", "inf", "-inf"]
    (record,) = read_metrics(tmp_path)
    back = np.array([record[f"x{i:03}"] for i in range(len(numbers))], np.float32)
    same = (back.view(np.uint32) == numbers.view(np.uint32)) | (np.isnan(back) & np.isnan(numbers))
    assert same.all()


def test_every_thins_lines_and_keeps_the_last(tmp_path):
    with log(tmp_path, total=7, every=3) as writer:
        seen = [writer.write(step, values(step)) for step in range(1, 8)]
    assert [record["step"] for record in read_metrics(tmp_path)] == [3, 6, 7]
    assert [v and v["optimizer/skipped"] for v in seen] == [None, 1, 2, 3, 4, 5, 6], "values come for every step"


def test_timing_is_apart_and_counts_tokens_of_every_step(tmp_path):
    with log(tmp_path, total=4, every=2) as writer:
        for step in range(1, 5):
            writer.write(step, {"data/tokens": jnp.int32(10), "loss/sft": jnp.float32(1)})
        writer.write_now(4, {"eval/loss": 1.0})
    timing = [json.loads(line) for line in lines(tmp_path, m.TIMING_FILE)]
    assert [t["step"] for t in timing] == [2, 4]
    for t in timing:
        assert t["seconds"] > 0 and t["tokens_per_second"] == pytest.approx(10 * t["steps_per_second"])
    assert not any("second" in line for line in lines(tmp_path))


def test_evaluations_are_written_after_the_steps_before_them(tmp_path):
    with log(tmp_path, every=10) as writer:
        writer.write(10, {"loss/sft": jnp.float32(1)})
        assert writer.write_now(10, {"eval/loss": Mean(jnp.float32(1), jnp.float32(2)), "eval/x": 0.25}) == {
            "eval/loss": 0.5,
            "eval/x": 0.25,
        }
        assert writer.write(11, {"loss/sft": jnp.float32(2)}) == {"loss/sft": 1.0}, "an evaluation does not swallow a step's values"
    assert lines(tmp_path) == ['{"step": 10, "loss/sft": 1.0}', '{"step": 10, "eval/loss": 0.5, "eval/x": 0.25}']


# --- asynchrony ---


class Unready:
    """A device scalar of a step that has not finished: reading it fails the test until it is `ready`."""

    shape, ndim, dtype = (), 0, np.dtype(np.float32)

    def __init__(self, value):
        self.value, self.ready, self.reads = value, False, 0

    def __array__(self, dtype=None, copy=None):
        assert self.ready, "the newest step was waited for"
        self.reads += 1
        return np.asarray(self.value, np.float32)


def test_write_never_waits_for_the_newest_step(tmp_path):
    steps = [Unready(float(step)) for step in range(4)]
    writer = log(tmp_path)
    assert writer.write(0, {"x": steps[0]}) is None
    for step in range(1, 4):
        steps[step - 1].ready = True  # the step before has finished by now
        assert writer.write(step, {"x": steps[step]}) == {"x": step - 1.0}
    steps[3].ready = True
    assert writer.flush() == {"x": 3.0} and writer.flush() is None
    assert writer.write(4, {"x": jnp.float32(4)}) is None, "flush has returned them"
    writer.close()
    assert [step.reads for step in steps] == [1, 1, 1, 1]


def test_the_values_of_a_write_are_fetched_at_once_and_late(tmp_path, monkeypatch):
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(m.jax, "device_get", lambda tree: fetched.append(tree) or get(tree))
    with log(tmp_path) as writer:
        first, second = values(1), values(2)
        with jax.transfer_guard("disallow_explicit"):
            writer.write(1, first)
        assert fetched == []
        writer.write(2, second)
        assert len(fetched) == 1 and fetched[0]["loss/sft"] is first["loss/sft"]
    assert len(fetched) == 2


def test_implicit_transfers_are_never_made(tmp_path):
    first, second = (jax.device_put(values(step), jax.devices()[1]) for step in (1, 2))
    with jax.transfer_guard("disallow"), log(tmp_path) as writer:
        writer.write(1, first)
        writer.write(2, second)
    assert len(read_metrics(tmp_path)) == 2


def test_non_finite_values_reach_the_loop(tmp_path):
    with log(tmp_path) as writer:
        writer.write(1, {"loss/sft": jnp.float32(jnp.nan)})
        assert np.isnan(writer.write(2, {"loss/sft": jnp.float32(1)})["loss/sft"])


def test_wrong_shapes_are_refused(tmp_path):
    with log(tmp_path) as writer:
        with pytest.raises(AssertionError, match="rank"):
            writer.write(1, {"loss/sft": jnp.ones(3)})
        with pytest.raises(AssertionError, match="rank"):
            writer.write_now(1, {"loss/sft": Mean(jnp.ones(3), jnp.ones(3))})


# --- resuming ---


def run(workdir, start, stop, total=6):
    with log(workdir, start=start, total=total) as writer:
        for step in range(start + 1, stop + 1):
            writer.write(step, values(step))
            if step % 2 == 0:
                writer.write_now(step, {"eval/loss": step / 3})


@pytest.mark.parametrize("tail", [b"", b'{"step": 6, "loss/s', b"\x00\x00"])
@pytest.mark.parametrize("restored", [-1, 0, 2, 3])
def test_a_cut_and_continued_log_is_byte_identical(tmp_path, restored, tail):
    run(tmp_path / "unbroken", 0, 6)
    killed = tmp_path / "killed"
    run(killed, 0, 5)
    with (killed / m.METRICS_FILE).open("ab") as file:
        file.write(tail)
    cut_back(killed, restored)
    assert [t["step"] for t in map(json.loads, lines(killed, m.TIMING_FILE))] == list(range(1, restored + 1))
    run(killed, max(restored, 0), 6)
    assert (killed / m.METRICS_FILE).read_bytes() == (tmp_path / "unbroken" / m.METRICS_FILE).read_bytes()
    assert sorted(p.name for p in killed.iterdir()) == [m.METRICS_FILE, m.TIMING_FILE]


def test_cutting_nothing_leaves_the_file_alone(tmp_path):
    cut_back(tmp_path, 3)
    assert list(tmp_path.iterdir()) == [] and read_metrics(tmp_path) == []
    run(tmp_path, 0, 3)
    inode = (tmp_path / m.METRICS_FILE).stat().st_ino
    cut_back(tmp_path, 3)
    assert (tmp_path / m.METRICS_FILE).stat().st_ino == inode


def test_a_failed_cut_keeps_the_old_log(tmp_path, monkeypatch):
    run(tmp_path, 0, 3)
    before = (tmp_path / m.METRICS_FILE).read_bytes()
    monkeypatch.setattr(m.epath.Path("").__class__, "replace", lambda *args: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        cut_back(tmp_path, 1)
    assert (tmp_path / m.METRICS_FILE).read_bytes() == before


def test_torn_and_foreign_lines(tmp_path):
    run(tmp_path, 0, 2)
    path = tmp_path / m.METRICS_FILE
    path.write_bytes(path.read_bytes() + b'{"step": 3')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 2]
    for foreign in (b"hello\n", b'{"loss": 1}\n', b"[1]\n"):
        path.write_bytes(foreign + b'{"step": 3}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl:1 is not a line"):
            read_metrics(tmp_path)


def test_sigkill_loses_at_most_the_last_write(tmp_path):
    code = textwrap.dedent("""
        import os, signal, sys, jax.numpy as jnp
        from rlhf_jax.train.metrics import MetricsLog
        log = MetricsLog(sys.argv[1], start_step=0, total_steps=9, every=1, tensorboard=False, wandb=None, console=False)
        for step in range(1, 6):
            log.write(step, {"loss/sft": jnp.float32(step)})
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert [r["loss/sft"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]


# --- other sinks ---


def test_tensorboard_events_are_written_and_purged_on_resume(tmp_path):
    from tensorboardX.proto import event_pb2

    with log(tmp_path, tensorboard=True) as writer:
        writer.write(1, {"loss/sft": jnp.float32(0.5)})
    with log(tmp_path, start=1, tensorboard=True) as writer:
        writer.write(2, {"loss/sft": jnp.float32(0.25)})
    events = []
    for path in sorted((tmp_path / m.TENSORBOARD_FOLDER).iterdir()):
        content, at = path.read_bytes(), 0  # records: 8 bytes of length, 4 of CRC, the event, 4 of CRC
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            events.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    scalars = sorted((e.step, v.tag, v.simple_value) for e in events for v in e.summary.value)
    assert scalars == [(1, "loss/sft", 0.5), (2, "loss/sft", 0.25)]
    assert [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START] == [1, 2], (
        "steps ≥ 2 of the killed run are dropped"
    )


def test_wandb_asked_for_and_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config\.log\.wandb.*rlhf-jax\[wandb\]"):
        log(tmp_path / "new", wandb={"project": "p"})
    assert not (tmp_path / "new").exists(), "nothing half-written"
    log(tmp_path, wandb=None).close()


def test_wandb_receives_the_lines(tmp_path, monkeypatch):
    calls = []
    service = types.SimpleNamespace(log=lambda v, step: calls.append((step, v)), finish=lambda: calls.append("finish"))
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or service)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with log(tmp_path, wandb={"project": "p"}) as writer:
        writer.write(1, {"loss/sft": jnp.float32(0.5)})
    assert calls == [{"dir": str(tmp_path), "resume": "allow", "project": "p"}, (1, {"loss/sft": 0.5}), "finish"]


def test_plain_lines_when_stderr_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(m, "PLAIN_LINE_SECONDS", 3600.0)
    with log(tmp_path, total=5, console=True) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss/sft": jnp.float32(step / 2), "objective/score": jnp.float32(1)})
            if step == 3:
                writer.write_now(3, {"eval/loss": 0.125})
    shown = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in shown] == ["1/5", "3/5", "5/5"], "the first, evaluations and the last are never skipped"
    assert "loss/sft 0.5" in shown[0] and "objective/score 1" in shown[0] and "steps/s" in shown[0] and "eval/loss 0.125" in shown[1]


def test_progress_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with log(tmp_path, start=2, total=6, every=2, console=True) as writer:
        for step in range(3, 7):
            writer.write(step, {"loss/sft": jnp.float32(step / 2)})
        writer.write_now(6, {"eval/loss": 0.125})
    shown = capsys.readouterr().err
    assert "6/6" in shown and "loss/sft 3" in shown and "step 6  eval/loss 0.125" in shown


def test_other_hosts_fetch_and_do_not_write(tmp_path, monkeypatch):
    monkeypatch.setattr(m, "is_lead", lambda: False)
    with log(tmp_path, console=True, tensorboard=True) as writer:
        writer.write(1, {"loss/sft": jnp.float32(1)})
        assert writer.write(2, {"loss/sft": jnp.float32(2)}) == {"loss/sft": 1.0}
    assert list(tmp_path.iterdir()) == []


def test_every_must_be_positive(tmp_path):
    with pytest.raises(UserError, match=r"config\.log\.every = 0"):
        log(tmp_path, every=0)
