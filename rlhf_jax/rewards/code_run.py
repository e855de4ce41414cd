"""Programs that a model wrote, run in a subprocess with limits, and judged by tests.

Flow: the program goes into a temporary folder and runs there under `_contained.py`, in a session of its own, with a bare environment (no keys),
limits on CPU time, memory, file size and number of processes, and a wall-clock limit after which everything in its session and process namespace is
killed. Tests are pairs of standard input and expected output, which the program never sees, or assertions, run in the program's own process after
it.

What holds depends on the system, and `fences()` says what does. On Linux with namespaces: no network, and no process outlives the run. With
Landlock: it reads the interpreter and the system's libraries only, and writes its own folder only. As root it runs as another user. Without these
(macOS, some containers) the limits alone hold: the program can then read and write whatever this user can, reach the network, and leave a process
of another session behind. It is a fence against accidents and lazy cheating, not against an attacker of the kernel; do not run it where that
matters. Assertions share a process with the program: one written to look for them can find them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

INNER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_contained.py")
SHOWN = 1 << 20  # bytes of output that are read
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
HARNESS = """import sys
token = sys.stdin.readline().strip()
names = {"__name__": "solution"}
exec(compile(open("program.py").read(), "program.py", "exec"), names)
passed = ""
for test in TESTS:
    try:
        exec(compile(test, "test", "exec"), names)
        passed += "1"
    except BaseException:
        passed += "0"
sys.__stdout__.write("\\n" + token + passed + "\\n")
sys.__stdout__.flush()
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0  # by the clock
    memory: int = 512  # MiB of address space, of each process
    file: int = 16  # MiB of each file; their number is not limited
    processes: int = 16  # and threads; of all this user's where no user of its own and no namespace can be had

    def __post_init__(self) -> None:
        if min(self.seconds, self.memory, self.file, self.processes) <= 0:
            raise ValueError(f"limits must be positive: {self}")


@dataclasses.dataclass(frozen=True)
class Run:
    """How a program ended."""

    code: int | None  # exit status, 128 + signal; None: killed because its time was up
    output: str
    errors: str


class NoSandbox(RuntimeError):
    """The sandbox itself could not be started."""


def program(response: str) -> str:
    """The program in a response: its last fenced block, else the whole text."""
    blocks = re.findall(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)```", response, flags=re.DOTALL)
    return blocks[-1] if blocks else response


def run(source: str, *, stdin: str = "", limits: Limits = Limits()) -> Run:
    """Runs a Python program.

    Args:
      source: its text.
      stdin: what it reads.
      limits: what it may use.

    Raises:
      NoSandbox: not the program but the sandbox failed.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf_jax_code_") as place:
        folder = os.path.join(place, "work")
        os.mkdir(folder)
        with open(os.path.join(folder, "program.py"), "w", encoding="utf-8", errors="replace") as file:
            file.write(source)
        return _contained([sys.executable, "-I", "program.py"], place, stdin, limits)


def outputs_passed(source: str, tests: Sequence[tuple[str, str]], *, limits: Limits, to_the_end: bool = True) -> list[bool]:
    """Which tests a program passes that reads standard input: its output is the expected one, but for space at the ends of lines.

    Args:
      source: the program.
      tests: (input, expected output).
      limits: of each run.
      to_the_end: run the tests behind one that fails.

    Returns:
      as many as were run.
    """
    lines = lambda text: [line.rstrip() for line in text.rstrip().split("\n")]  # noqa: E731
    passed: list[bool] = []
    for given, expected in tests:
        if to_the_end or all(passed):
            result = run(source, stdin=given, limits=limits)
            passed.append(result.code == 0 and lines(result.output) == lines(expected))
    return passed


def assertions_passed(source: str, tests: Sequence[str], *, limits: Limits) -> list[bool]:
    """Which assertions hold after a program has defined its functions; none if it does not get that far, by an early exit either.

    Args:
      source: the program.
      tests: statements, e.g. "assert f(1) == 2".
      limits: of the one run.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="rlhf_jax_code_") as place:
        folder = os.path.join(place, "work")
        os.mkdir(folder)
        for name, text in (("program.py", source), ("harness.py", HARNESS.replace("TESTS", repr(list(tests))))):
            with open(os.path.join(folder, name), "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
        ended = _contained([sys.executable, "-I", "harness.py"], place, token + "\n", limits)
    found = re.search(rf"^{token}([01]*)$", ended.output, flags=re.MULTILINE)
    verdicts = found[1] if found and len(found[1]) == len(tests) else "0" * len(tests)
    return [verdict == "1" for verdict in verdicts]


@functools.cache
def fences(limits: Limits = Limits()) -> frozenset[str]:
    """Which of "network", "processes", "user" and "files" the sandbox closes off on this system; the limits hold everywhere.

    Args:
      limits: those that a small program is tried within, but for the time, which a busy machine may take from it.

    Raises:
      NoSandbox: the program does not run in it.
    """
    limits = dataclasses.replace(limits, seconds=max(limits.seconds, 20.0))
    with tempfile.TemporaryDirectory(prefix="rlhf_jax_code_") as place:
        os.mkdir(os.path.join(place, "work"))
        ended = _contained([sys.executable], place, "", limits, report=True)
    tried = run("print(6 * 7)", limits=limits)
    if ended.code != 0 or tried.output != "42\n":
        raise NoSandbox(f"programs do not run in the sandbox on this system: {(ended.errors + tried.errors).strip()[-300:] or tried.code}")
    return frozenset(json.loads(ended.output))


def _contained(command: list[str], place: str, stdin: str, limits: Limits, report: bool = False) -> Run:
    """Runs a command in `place`/work; standard streams are files beside it."""
    folder = os.path.join(place, "work")
    if os.getuid() == 0:  # the program will be another user
        for path, mode in ((place, 0o711), (folder, 0o777)):
            os.chmod(path, mode)
    numbers: dict[str, Any] = {
        "cpu": int(limits.seconds) + 1, "memory": limits.memory << 20, "file": limits.file << 20, "processes": limits.processes, "report": report,
        "python": sorted({sys.prefix, sys.base_prefix, *(os.path.dirname(path) for path in (sys.executable, os.path.realpath(sys.executable)))}),
    }
    names = {name: os.path.join(place, name) for name in ("stdin", "stdout", "stderr")}
    with open(names["stdin"], "w", encoding="utf-8", errors="replace") as file:
        file.write(stdin)
    with open(names["stdin"], "rb") as given, open(names["stdout"], "wb") as output, open(names["stderr"], "wb") as errors:
        try:
            # No preexec_fn: forking a process with JAX's threads may hang.
            inner = subprocess.Popen(
                [sys.executable, "-I", "-S", INNER, json.dumps(numbers), folder, *command], stdin=given, stdout=output, stderr=errors,
                cwd=folder, env={**ENVIRONMENT, "HOME": folder, "TMPDIR": folder}, start_new_session=True,
            )
        except OSError as error:
            raise NoSandbox(f"the sandbox does not start: {error}") from error
        code: int | None = None
        try:
            code = inner.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(inner.pid, signal.SIGKILL)
            inner.wait()
    return Run(code, *(_beginning(names[name]) for name in ("stdout", "stderr")))


def _beginning(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(SHOWN).decode("utf-8", errors="replace")
