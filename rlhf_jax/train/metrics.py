"""The run's log: `metrics.jsonl`, `timing.jsonl`, TensorBoard, Weights & Biases and the console.

`MetricsLog.write` keeps the values it is given on the device and fetches those of the write before, all at once, so that the host never
waits for the step it has just dispatched. `metrics.jsonl` is deterministic (law 8): what the clock decides goes to `timing.jsonl`.
A killed run resumes bit-exact if the loop keeps this order at a step: `write`, evaluations (`write_now`), `flush`, save the checkpoint;
and, before it starts at a restored step, `cut_back` (to step −1 when nothing was restored).

A line holds the values of one step, never an average over steps: an average would depend on where the run was interrupted.
"""

from __future__ import annotations

import abc
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import chex
import jax
import numpy as np
from etils import epath

from rlhf_jax.distributed import is_lead
from rlhf_jax.errors import UserError
from rlhf_jax.files import Growing
from rlhf_jax.runlog import records
from rlhf_jax.types import Array, Mean

METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
PLAIN_LINE_SECONDS = 2.0  # at most one plain console line in this time


class MetricsLog:
    """Writes a run's metrics. Process 0 writes; the others only fetch, so that all take the same decisions. A context manager."""

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        start_step: int,
        total_steps: int,
        every: int,
        tensorboard: bool,
        wandb: Mapping[str, Any] | None,
        console: bool,
    ):
        """Opens the log for appending; call `cut_back` first.

        Args:
          workdir: the run's folder.
          start_step: updates made so far.
          total_steps: updates that the run will have made at its end.
          every: a line at multiples of this many steps, and at the last one; values are fetched for every step.
          tensorboard: write TensorBoard events too.
          wandb: arguments of `wandb.init`; None = no Weights & Biases.
          console: show a progress bar, or plain lines where stderr is not a terminal.

        Raises:
          UserError: `every` below 1, or Weights & Biases asked for and not installed.
        """
        if every < 1:
            raise UserError(f"config.log.every = {every} must be at least 1 step")
        self._every, self._total = every, total_steps
        self._pending: tuple[int, Mapping[str, Mean | Array]] | None = None
        self._landed: dict[str, float] | None = None
        self._sinks: list[_Sink] = []
        if is_lead():
            root = epath.Path(workdir)
            service = None if wandb is None else import_wandb()  # what can be refused is, before a file is made
            root.mkdir(parents=True, exist_ok=True)
            self._sinks = [_JsonLines(root, start_step)]
            if tensorboard:
                self._sinks.append(_TensorBoard(root / TENSORBOARD_FOLDER, start_step))
            if wandb is not None:
                self._sinks.append(_WandB(service, root, wandb))
            if console:
                self._sinks.append(_Bar(start_step, total_steps) if sys.stderr.isatty() else _Plain(start_step, total_steps))

    def write(self, step: int, metrics: Mapping[str, Mean | Array]) -> dict[str, float] | None:
        """Takes a step's metrics without waiting for them.

        Args:
          step: updates made, this one included.
          metrics: by name, a `Mean` or a scalar.

        Returns:
          The values of the write before, on the host; None at the first one and after a `flush`, which has returned them.
        """
        chex.assert_rank(jax.tree.leaves(dict(metrics)), 0)
        self._land()
        values, self._landed = self._landed, None
        self._pending = (step, metrics)
        return values

    def write_now(self, step: int, metrics: Mapping[str, Mean | Array | float]) -> dict[str, float]:
        """Writes an evaluation's metrics at once, whatever `every` says; returns their values."""
        chex.assert_rank(jax.tree.leaves(dict(metrics)), 0)
        self._land()
        values = _fetch(metrics)
        self._emit(step, values)
        return _floats(values)

    def flush(self) -> dict[str, float] | None:
        """Waits for the last step and writes it; returns what the next `write` would have returned. Call it before each checkpoint."""
        self._land()
        values, self._landed = self._landed, None
        for sink in self._sinks:
            sink.flush()
        return values

    def close(self) -> None:
        """Flushes and closes every file and service."""
        try:
            self.flush()
        finally:
            for sink in self._sinks:
                sink.close()
            self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _land(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = _fetch(metrics)
        self._landed = _floats(values)
        if step % self._every == 0 or step == self._total:
            self._emit(step, values)
        else:
            for sink in self._sinks:
                sink.pass_by(step, values)

    def _emit(self, step: int, values: Mapping[str, np.generic]) -> None:
        for sink in self._sinks:
            sink.emit(step, values)


def cut_back(workdir: epath.PathLike, step: int) -> None:
    """Drops what was logged after `step`, and a torn last line, atomically: the state of the log when `step` was saved.

    Args:
      workdir: the run's folder; without a log there is nothing to do.
      step: the restored step; −1 empties the log, for a run that starts again because no checkpoint survived.
    """
    if not is_lead():
        return
    for name in (METRICS_FILE, TIMING_FILE):
        path = epath.Path(workdir) / name
        if not path.exists():
            continue
        before = path.read_bytes()
        kept = b"".join(line for line, record in records(path) if record["step"] <= step)
        if kept != before:
            fresh = path.with_name(f"{name}.tmp")
            fresh.write_bytes(kept)
            fresh.replace(path)


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in order, with "nan", "inf" and "-inf" as floats; a torn last line is left out. Without a log: [].

    Raises:
      UserError: a line is not one of ours.
    """
    lines = records(epath.Path(workdir) / METRICS_FILE)
    return [{name: float(value) if isinstance(value, str) else value for name, value in record.items()} for _, record in lines]


def _fetch(metrics: Mapping[str, Any]) -> dict[str, np.generic]:
    """Host values, sorted by name, in one transfer: float32 or int; a Mean is total / count, with 1 in place of a zero count."""
    host = jax.device_get(dict(metrics))
    values: dict[str, np.generic] = {}
    for name in sorted(host):
        value = host[name]
        if isinstance(value, Mean):
            count = np.float32(value.count)
            value = np.divide(np.float32(value.total), count if count != 0 else np.float32(1))
        scalar = np.asarray(value)
        values[name] = np.int64(scalar) if scalar.dtype.kind in "iub" else np.float32(scalar)
    return values


def _floats(values: Mapping[str, np.generic]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _json(value: np.generic) -> str:
    """An integer, a float32's shortest text that reads back the same, or "nan", "inf", "-inf" as strings: valid JSON all."""
    if isinstance(value, np.integer):
        return str(int(value))
    return str(value) if math.isfinite(value) else json.dumps(str(value))


class _Sink(abc.ABC):
    """Where metrics go. `emit` takes a line's values; `pass_by` those of a step that gets no line."""

    @abc.abstractmethod
    def emit(self, step: int, values: Mapping[str, np.generic]) -> None: ...

    def pass_by(self, step: int, values: Mapping[str, np.generic]) -> None:  # noqa: B027
        """Most sinks have nothing to do between lines."""

    def flush(self) -> None:  # noqa: B027
        """Nothing to do where every line is flushed at once."""

    def close(self) -> None:  # noqa: B027
        """Nothing to do where nothing is open."""


class _JsonLines(_Sink):
    """metrics.jsonl and timing.jsonl; a line is handed to the system in one write."""

    def __init__(self, root: epath.Path, start_step: int):
        self._metrics, self._timing = Growing(root / METRICS_FILE), Growing(root / TIMING_FILE)
        self._start = self._last = time.perf_counter()
        self._step, self._tokens = start_step, 0.0

    def pass_by(self, step: int, values: Mapping[str, np.generic]) -> None:
        self._tokens += float(values.get("data/tokens", 0))

    def emit(self, step: int, values: Mapping[str, np.generic]) -> None:
        self.pass_by(step, values)
        fields = "".join(f", {json.dumps(name)}: {_json(value)}" for name, value in values.items())
        self._metrics.write(f'{{"step": {step}{fields}}}\n'.encode())
        if step > self._step:  # an evaluation of the same step adds nothing
            now = time.perf_counter()
            timing = {"step": step, "seconds": now - self._start, "steps_per_second": (step - self._step) / (now - self._last)}
            if self._tokens:
                timing["tokens_per_second"] = self._tokens / (now - self._last)
            self._timing.write(f"{json.dumps(timing)}\n".encode())
            self._last, self._step, self._tokens = now, step, 0.0

    def flush(self) -> None:
        self._metrics.flush()
        self._timing.flush()

    def close(self) -> None:
        self._metrics.close()
        self._timing.close()


class _TensorBoard(_Sink):
    def __init__(self, folder: epath.Path, start_step: int):
        from tensorboardX import SummaryWriter

        # The reader drops events after the restored step, written before the kill. File names otherwise differ by the second only.
        self._writer = SummaryWriter(os.fspath(folder), purge_step=start_step + 1, filename_suffix=f".{start_step}")

    def emit(self, step: int, values: Mapping[str, np.generic]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value.item(), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def import_wandb() -> Any:
    """The wandb module.

    Raises:
      UserError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        remedy = 'install it with `pip install "rlhf-jax[wandb]"` or unset it'
        raise UserError(f"config.log.wandb is set and Weights & Biases is not installed: {remedy}") from error
    return wandb


class _WandB(_Sink):
    def __init__(self, service: Any, root: epath.Path, options: Mapping[str, Any]):
        self._run = service.init(**{"dir": os.fspath(root), "resume": "allow", **options})

    def emit(self, step: int, values: Mapping[str, np.generic]) -> None:
        self._run.log(_floats(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _headline(values: Mapping[str, np.generic]) -> str:
    """What the console shows: the loss and the score of a step, or all of an evaluation."""
    losses = [name for name in values if name == "loss" or name.startswith("loss/")][:1]
    extra = [name for name in ("objective/score", "reward/accuracy", "objective/kl") if name in values]
    shown = [*losses, *extra] if losses else list(values)
    return "  ".join(f"{name} {float(values[name]):.4g}" for name in shown)


class _Bar(_Sink):
    """A progress bar; evaluations scroll above it."""

    def __init__(self, start_step: int, total_steps: int):
        from tqdm import tqdm

        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def pass_by(self, step: int, values: Mapping[str, np.generic]) -> None:
        self._bar.update(step - self._bar.n)

    def emit(self, step: int, values: Mapping[str, np.generic]) -> None:
        if step > self._bar.n:
            self._bar.set_postfix_str(_headline(values), refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._bar.write(f"step {step}  {_headline(values)}", file=sys.stderr)

    def flush(self) -> None:
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class _Plain(_Sink):
    """One line now and then, for a log file or a pipe."""

    def __init__(self, start_step: int, total_steps: int):
        self._start, self._total, self._step = start_step, total_steps, start_step
        self._began = time.perf_counter()
        self._printed = -math.inf

    def pass_by(self, step: int, values: Mapping[str, np.generic]) -> None:
        self._step = max(self._step, step)

    def emit(self, step: int, values: Mapping[str, np.generic]) -> None:
        now = time.perf_counter()
        evaluation = step <= self._step
        self._step = max(self._step, step)
        if not evaluation and step < self._total and now - self._printed < PLAIN_LINE_SECONDS:
            return
        self._printed = now
        rate = (step - self._start) / max(now - self._began, 1e-9)
        speed = "" if evaluation else f"  {rate:.3g} steps/s"
        print(f"step {step}/{self._total}  {_headline(values)}{speed}", file=sys.stderr, flush=True)
