"""Runs a plan: its commands one by one with retries, then watches, recovers preempted machines, and cleans up.

Exit codes, as everywhere: 0 the run is done, 2 a mistake in the config or in a command's arguments, 75 preempted more often than was allowed (the
same command goes on), 1 it crashed or the machines could not be had.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from rlhf_jax.errors import CRASHED, DONE, MISTAKE, PREEMPTED, UserError
from rlhf_jax.files import write_whole
from rlhf_jax.launch.backoff import pause
from rlhf_jax.launch.job import JOB
from rlhf_jax.launch.plan import Command, Plan, Step, Watch

UNREADABLE = 10  # looks in a row that fail before the watch ends
GRACE = 10  # looks for which the last processes may take longer than the first one
USAGE = 2  # gcloud's, xpk's and sky's exit code for arguments that they do not know


class Failed(Exception):
    """A command that did not succeed, with the exit code that this means for the launch."""

    def __init__(self, says: str, code: int) -> None:
        super().__init__(says)
        self.code = code


class Runner:
    """Runs one plan.

    Args:
      plan: what to do.
      say: prints a line of progress.
      sleep: waits some seconds.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
                 sleep: Callable[[float], None] = time.sleep) -> None:
        self.plan, self.say, self.sleep = plan, say, sleep

    def run(self) -> int:
        """Does everything in the plan; returns the exit code.

        Raises:
          UserError: a tool that the plan calls is not installed.
        """
        plan = self.plan
        self.say(plan.title)
        self._find_tools()
        self._write_files()
        try:
            code = self._started()
        except Failed as failure:
            self.say(str(failure))
            code = failure.code
        except KeyboardInterrupt:
            if plan.outcomes:
                self.say("no longer watched; the machines are still there: `rlhf-jax launch status`, or `rlhf-jax launch stop`")
            raise
        if plan.outcomes:
            self.say({DONE: "done", MISTAKE: "stopped by a mistake, see the logs", PREEMPTED: "preempted too often; the same command goes on"}
                     .get(code, "crashed, see the logs"))
        return code

    def _started(self) -> int:
        """From the first command to the last; machines that were had are deleted whatever happens then."""
        plan = self.plan
        there = self._look(plan.watch.state) if plan.watch else None
        if plan.watch is None or not there:
            self._all(plan.steps)
        elif there in plan.watch.lost + plan.watch.failed:  # of an earlier launch
            self._all((*plan.steps[:-1], *plan.watch.recover))
        else:
            self.say(f"the machines are there already ({there}): watching them")
        try:
            if plan.watch is not None:
                return self._watched(plan.watch)
            if plan.wait is not None:
                ended = self._try(plan.wait)
                verdict = self._verdict(self._outcomes(), processes=1, patience=0)
                return verdict if verdict is not None else DONE if ended == 0 else CRASHED
            return DONE
        except Failed as failure:
            self.say(str(failure))
            return failure.code
        finally:
            if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                self._clean_up()

    def _clean_up(self) -> None:
        try:
            self._all(self.plan.clean_up)
        except Failed as failure:
            self.say(f"{failure}: look with `rlhf-jax launch status` whether machines are left")

    def _watched(self, watch: Watch) -> int:
        """Looks until every process has ended or there are no machines left to hope for."""
        lost, failed, unreadable, patience, before = 0, 0, 0, GRACE, ""
        while True:
            self.sleep(watch.seconds)
            outcomes = self._outcomes()
            verdict = self._verdict(outcomes, watch.processes, patience)
            if verdict is not None:
                return verdict
            patience -= bool(outcomes)
            looked = self._look(watch.state)
            if looked is None:
                unreadable += 1
                if unreadable == UNREADABLE:
                    raise Failed(f"the state could not be read {UNREADABLE} times in a row", CRASHED)
                continue
            unreadable = 0
            if looked != before:
                self.say(f"state: {looked}")
                before = looked
            if looked in watch.lost:
                lost += 1
                if lost > self.plan.preemptions:
                    return PREEMPTED
            elif looked in watch.failed:
                failed += 1
                if failed > self.plan.crashes:
                    return CRASHED
            else:
                continue
            self.say(f"preempted {lost} of {self.plan.preemptions} times, failed {failed} of {self.plan.crashes} times: new machines")
            self.sleep(pause(lost + failed))
            self._all(watch.recover)

    def _verdict(self, outcomes: Sequence[int], processes: int, patience: int) -> int | None:
        """The exit code that the processes' outcomes amount to; None: the run goes on."""
        if MISTAKE in outcomes:
            return MISTAKE
        if any(code != DONE for code in outcomes):
            return CRASHED
        return DONE if outcomes and (len(outcomes) >= processes or patience <= 0) else None

    def _outcomes(self) -> list[int]:
        """Exit codes of the processes that have ended; none where the bucket has no outcomes or cannot be read."""
        rows = (self._look(self.plan.outcomes) or "").split("\n")
        return [int(row.split()[1]) for row in rows if len(row.split()) == 2 and row.split()[1].isdigit()]

    def _all(self, steps: Sequence[Step]) -> None:
        for number, step in enumerate(steps, start=1):
            self.say(f"[{number}/{len(steps)}] {step.says}: {' '.join(step.command[:5])} …")
            code = self._try(step)
            if code and not step.may_fail:
                raise Failed(f"{step.says}: {step.command[0]} ended with {code}", MISTAKE if code == USAGE else CRASHED)

    def _try(self, step: Step) -> int:
        """Runs a command until it succeeds or its attempts are used up; a wrong argument is not tried twice."""
        for attempt in range(1, step.attempts + 1):
            code = subprocess.run(step.command, check=False, stderr=subprocess.DEVNULL if step.may_fail else None).returncode
            if code in (DONE, USAGE) or attempt == step.attempts:
                return code
            self.say(f"{step.says}: exit code {code}, try {attempt} of {step.attempts}; again in {pause(attempt):g} s")
            self.sleep(pause(attempt))
        return CRASHED

    def _look(self, command: Command) -> str | None:
        """What a command prints; None where it fails."""
        looked = subprocess.run(command, check=False, capture_output=True, text=True)
        return looked.stdout.strip() if looked.returncode == 0 else None

    def _find_tools(self) -> None:
        steps = (*self.plan.steps, *self.plan.clean_up, *((self.plan.wait,) if self.plan.wait else ()))
        for name in {step.command[0] for step in steps if not step.may_fail} | set(self.plan.outcomes[:1]):
            if shutil.which(name) is None:
                raise UserError(f"{name} is not installed here: rlhf_jax/launch/README.md says how, and --dry-run needs none of the tools")

    def _write_files(self) -> None:
        for file in self.plan.files:
            if file.path.endswith(f"/{JOB}"):  # what an earlier launch left in the job's folder is no part of this one
                shutil.rmtree(pathlib.Path(file.path).parent, ignore_errors=True)
        for file in self.plan.files:
            write_whole(file.path, file.text)
