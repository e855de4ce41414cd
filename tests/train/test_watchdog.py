"""The watchdog: what takes too long ends the process with its own exit code and all stacks; what compiles, and what is quick, does not."""

from __future__ import annotations

import subprocess
import sys
import time

from rlhf_jax.train.watchdog import HUNG, PATIENCE, Watchdog
from tests.train.hosts import ROOT

STUCK = """
import threading, time
from rlhf_jax.train.watchdog import Watchdog

def never_answers():
    time.sleep(60)

with Watchdog(0.3) as dog:
    with dog.watching("a step", 1):
        time.sleep(0.8)
    with dog.watching("a step", 2):
        time.sleep(0.01)
    time.sleep(0.5)
    print("alive", flush=True)
    with dog.watching("a step", 3):
        never_answers()
"""


def test_a_step_that_stands_still_ends_the_process() -> None:
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == HUNG and ended.stdout == "alive\n" and time.monotonic() - began < 50
    assert "config.run.watchdog = 0.3: a step at step 3 has not ended after 0.3 s on host 0 of 1; the same command goes on" in ended.stderr
    assert "never_answers" in ended.stderr and ended.stderr.count("most recent call first") >= 2  # every thread's


def test_the_first_of_each_kind_and_patience_are_let_be() -> None:
    with Watchdog(0.2) as dog:
        with dog.watching("the save", 1, PATIENCE):
            time.sleep(0.5)
        with dog.watching("the save", 2, PATIENCE):
            time.sleep(0.5)
        with dog.watching("a step", 2):
            time.sleep(0.5)


def test_off_is_off() -> None:
    with Watchdog(0.0) as dog:
        for step in range(3):
            with dog.watching("a step", step):
                time.sleep(0.02)
