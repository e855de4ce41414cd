"""A launch as data: files, then commands one after the other, then what is watched and what follows from it. Nothing here runs anything."""

from __future__ import annotations

import dataclasses
import json
import shlex

Command = tuple[str, ...]  # an argument list: no shell reads it


@dataclasses.dataclass(frozen=True)
class File:
    """A text file that the commands read."""

    path: str
    text: str


@dataclasses.dataclass(frozen=True)
class Step:
    """One command."""

    says: str  # what it is for
    command: Command
    attempts: int = 4  # how often it is tried, with growing pauses
    may_fail: bool = False  # whether the plan goes on without it


@dataclasses.dataclass(frozen=True)
class Watch:
    """How to see what becomes of the machines, and how many processes report their outcome."""

    state: Command  # prints one word
    lost: tuple[str, ...]  # words that say that the machines are gone or going: preempted
    failed: tuple[str, ...]  # words that say that there will be none
    processes: int
    recover: tuple[Step, ...]  # after `lost` or `failed`
    seconds: float = 30.0  # between two looks


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that one `rlhf-jax launch` does."""

    title: str
    files: tuple[File, ...]
    steps: tuple[Step, ...]
    wait: Step | None = None  # returns when the run has ended, where the backend restarts it and cleans up by itself; or
    watch: Watch | None = None
    outcomes: Command = ()  # prints a line `HOST CODE` for each process that has ended; () where nothing is waited for
    clean_up: tuple[Step, ...] = ()  # at the end, however it went
    crashes: int = 0  # how often machines that failed are asked for again
    preemptions: int = 0  # how often preempted ones are


def as_json(plan: Plan) -> str:
    """The plan as JSON."""
    return json.dumps(dataclasses.asdict(plan), indent=2, ensure_ascii=False) + "\n"


def as_text(plan: Plan) -> str:
    """The plan for a reader: every file whole, every command as one would type it."""
    parts = [plan.title]
    parts += [f"— file {file.path}\n{_indented(file.text)}" for file in plan.files]
    parts += [_block("steps", plan.steps)]
    if plan.wait:
        parts.append(_block("until the run has ended", (plan.wait,)))
    if plan.watch:
        watch = plan.watch
        parts.append(f"— every {watch.seconds:g} s\n  $ {shlex.join(watch.state)}")
        parts.append(_block(f"when it says {' or '.join(watch.lost)} (at most {plan.preemptions} times), or {' or '.join(watch.failed)} "
                            f"(at most {plan.crashes} times)", watch.recover))
    if plan.outcomes:
        parts.append(f"— how it ended: a line `HOST CODE` for each process\n  $ {shlex.join(plan.outcomes)}")
    if plan.clean_up:
        parts.append(_block("at the end, however it went", plan.clean_up))
    return "\n\n".join(parts) + "\n"


def _block(title: str, steps: tuple[Step, ...]) -> str:
    rows = [f"  {number}. {step.says}{'; may fail' if step.may_fail else ''}\n     $ {shlex.join(step.command)}"
            for number, step in enumerate(steps, start=1)]
    return "\n".join([f"— {title}", *rows])


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}".rstrip() for line in text.splitlines())
