"""The sandbox: what a program can do is run and be judged; each way out that is said to be closed on this system is tried."""

from __future__ import annotations

import os
import pathlib
import time
from typing import Any

import pytest

from rlhf_jax.rewards import code_run, rules

QUICK = code_run.Limits(seconds=4.0)
DOUBLE = "def double(x):\n    return 2 * x\n"


def closed(*fences: str) -> Any:
    missing = set(fences) - code_run.fences()
    return pytest.mark.skipif(bool(missing), reason=f"this system does not offer {', '.join(missing)}")


def test_a_program_reads_and_writes() -> None:
    assert code_run.run("print(input()[::-1])", stdin="abc\n", limits=QUICK) == code_run.Run(0, "cba\n", "")
    ended = code_run.run("import sys; sys.exit(3)", limits=QUICK)
    assert ended.code == 3
    ended = code_run.run("open('mine', 'w').write('x'); print(open('mine').read()); 1 / 0", limits=QUICK)
    assert ended.code == 1 and ended.output == "x\n" and "ZeroDivisionError" in ended.errors


def test_tests_by_standard_input() -> None:
    tests = [("2\n", "4"), ("3", "6  \n\n"), ("4", "9"), ("x", "1")]
    assert code_run.outputs_passed("print(int(input()) * 2)", tests, limits=QUICK) == [True, True, False, False]


@pytest.mark.parametrize(("partial", "score", "runs"), [(False, 0.0, 2), (True, 2 / 3, 3)])
def test_the_tests_behind_a_failure_run_where_they_count(partial: bool, score: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = {"tests": [{"input": "2", "output": "4"}, {"input": "3", "output": "5"}, {"input": "4", "output": "8"}]}
    calls: list[str] = []
    rules.code([], [], [])  # the sandbox is tried once, before
    original = code_run.run
    monkeypatch.setattr(code_run, "run", lambda *a, **k: calls.append(k["stdin"]) or original(*a, **k))
    assert rules.code([[]], ["print(int(input()) * 2)"], [tests], partial=partial) == [score] and len(calls) == runs


@pytest.mark.parametrize(
    ("source", "passed"),
    [
        (DOUBLE, [True, False]),
        (DOUBLE + "print('noise')\nimport sys\nsys.stdout = None\n", [True, False]),
        ("import os\nprint('11')\nos._exit(0)", [False, False]),
        ("raise SystemExit(0)", [False, False]),
        ("def double(x):\n    import os; os._exit(0)", [False, False]),
        ("def double(x:", [False, False]),
        ("while True: pass", [False, False]),
    ],
)
def test_assertions(source: str, passed: list[bool]) -> None:
    limits = code_run.Limits(seconds=1.5)
    assert code_run.assertions_passed(source, ["assert double(2) == 4", "assert double(2) == 5"], limits=limits) == passed


def test_a_loop_without_end_is_stopped() -> None:
    begun = time.monotonic()
    assert code_run.run("while True: pass", limits=code_run.Limits(seconds=1.0)).code is None
    assert time.monotonic() - begun < 4.0


def test_memory_is_capped() -> None:
    ended = code_run.run("x = bytearray(2 << 30)\nprint('got it')", limits=QUICK)
    assert ended.code == 1 and "MemoryError" in ended.errors and not ended.output


def test_files_are_capped() -> None:
    ended = code_run.run("f = open('big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))\nprint('all')", limits=QUICK)
    assert ended.code != 0 and not ended.output
    flood = code_run.run("while True: print('x' * 1000)", limits=code_run.Limits(seconds=3.0, file=2))
    assert flood.code != 0 and len(flood.output) <= code_run.SHOWN


@closed("user")
def test_a_fork_bomb_is_capped_and_cleared_away() -> None:
    source = "import os, time\nn = 0\ntry:\n    while n < 500:\n        if os.fork() == 0: time.sleep(30)\n        n += 1\nexcept OSError: print(n)"
    ended = code_run.run(source, limits=code_run.Limits(seconds=4.0, processes=8))
    assert ended.code == 0 and int(ended.output) == 7
    code_run.run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", limits=code_run.Limits(seconds=1.0, processes=8))
    assert gone("program.py")


def gone(word: str) -> bool:
    """Whether no such process is left a moment later: a killed one is cleared away by the system in its own time."""
    until = time.monotonic() + 10.0
    while running(word) and time.monotonic() < until:
        time.sleep(0.05)
    return not running(word)


def running(word: str) -> list[str]:
    """Command lines of processes on this machine, of the sandbox's other users, that hold a word."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.parent.stat().st_uid >= 1_000_000_000 and word in (line := path.read_bytes().decode()):
                found.append(line)
        except OSError:
            continue
    return found


@closed("processes")
def test_a_process_of_another_session_does_not_outlive_the_run(tmp_path: pathlib.Path) -> None:
    source = ("import os, time\nr, w = os.pipe()\nif os.fork() == 0:\n    os.setsid()\n    os.write(w, b'x')\n    time.sleep(30)\n"
              "os.read(r, 1)\nprint('left it')")
    begun = time.monotonic()
    ended = code_run.run(source, limits=QUICK)
    assert ended.output == "left it\n" and time.monotonic() - begun < 4.0
    assert gone("program.py")


@closed("network")
def test_there_is_no_network() -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        ended = code_run.run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nprint('through')", limits=QUICK)
    assert ended.code == 1 and not ended.output


@closed("files")
def test_files_outside_are_neither_read_nor_written(tmp_path: pathlib.Path) -> None:
    secret, target = tmp_path / "secret", pathlib.Path("/tmp") / f"rlhf_jax_written_{os.getpid()}"
    secret.write_text("key")
    secret.chmod(0o644)
    for path in (secret, "/etc/passwd"):
        assert "PermissionError" in code_run.run(f"print(open({str(path)!r}).read())", limits=QUICK).errors
    ended = code_run.run(f"open({str(target)!r}, 'w').write('x')", limits=QUICK)
    assert "PermissionError" in ended.errors and not target.exists()


def test_the_environment_holds_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "hunter2")
    ended = code_run.run("import os; print(dict(os.environ))", limits=QUICK)
    assert ended.code == 0 and "hunter2" not in ended.output and "PATH" in ended.output


def test_nothing_is_left_on_disk() -> None:
    before = set(pathlib.Path("/tmp").glob("rlhf_jax_code_*"))
    code_run.run("import os; os.mkdir('d'); open('d/f', 'w').write('x'); os.chmod('d', 0)", limits=QUICK)
    assert set(pathlib.Path("/tmp").glob("rlhf_jax_code_*")) <= before


def test_the_rule() -> None:
    fenced = f"Here:\n```python\nprint('an example')\n```\nand\n```python\n{DOUBLE}```\nDone."
    tests = {"tests": ["assert double(2) == 4", "assert double(0) == 1"]}
    assert rules.code([[]] * 3, [fenced, DOUBLE, "no program"], [{"tests": "assert double(3) == 6"}, tests, tests]) == [1.0, 0.0, 0.0]
    assert rules.code([[]], [fenced], [tests], partial=True) == [0.5]
    assert rules.code([[]], ["print(int(input()) + 1)"], [{"tests": [{"input": "1", "output": 2}]}]) == [1.0]


def test_a_sandbox_in_which_nothing_runs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    code_run.fences.cache_clear()
    monkeypatch.setattr(code_run.sys, "executable", "/bin/false")
    with pytest.raises(code_run.NoSandbox, match="do not run in the sandbox"):
        code_run.fences()
    monkeypatch.undo()
    code_run.fences.cache_clear()
