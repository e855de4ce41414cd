"""A run: assemble, restore, advance batch by batch, log, validate, checkpoint.

Batch s is a function of (seed, s), randomness of counters, and the log is cut back to the restored step; so a run killed anywhere and
started again by the same command ends in the same state, bit for bit, with the same metrics.jsonl. Metrics are fetched one step late and
nothing in the loop waits for the device, except where a host reward must read the samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from rlhf_jax import checkpoint, distributed, sharding
from rlhf_jax.data.prefetch import Prefetcher
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.files import Growing
from rlhf_jax.models import layout
from rlhf_jax.train import agreement, schedule
from rlhf_jax.train import metrics as run_log
from rlhf_jax.train.assemble import Experiment, assemble, full_params
from rlhf_jax.train.config import check, hosts
from rlhf_jax.train.optimizer import evaluation_params
from rlhf_jax.train.programs import Programs
from rlhf_jax.train.rewarding import completions, failed_samples
from rlhf_jax.train.start import beside_a_base
from rlhf_jax.train.watchdog import PATIENCE, Watchdog
from rlhf_jax.types import PyTree, Rollout, TrainState

PROFILED = 3  # steps in a --profile trace, after one warm-up step
FREE = ("log", "checkpoint", "run.watchdog", "mesh.multihost", "mesh.heartbeat")  # config sections and keys that a resumed run may change
FILES = {"train": ("data", "train"), "valid": ("data", "valid"), "ptx": ("ptx", "train")}  # data.json's names → config sections and keys


@dataclasses.dataclass
class Result:
    """How a run ended."""

    step: int
    stopped: str  # "finished" | "early" (validation stopped improving) | "preempted"
    state_hash: str
    best_step: int | None
    best_value: float | None


def train(config: Any, workdir: str, *, profile: bool = False) -> Result:
    """Trains by `config` in `workdir`, or goes on where a run of the same config stopped there.

    Args:
      config: what a get_config() returned.
      workdir: local or gs:// folder of this run.
      profile: write a trace of a few steps to workdir/profile.

    Raises:
      UserError: anything wrong with config, data, checkpoints or devices, before the first compilation.
    """
    folder = epath.Path(workdir)
    distributed.initialize(*hosts(config))
    with distributed.meeting() as agree:
        checked, objective = check(config)
        _same_config(folder, checked)
        shared = agreement.facts(json.loads(json.dumps(_jsonable(checked))), objective, folder)
        exp = assemble(checked, objective, lambda found: agree({**shared, **found}))
    programs = Programs(exp)
    _refuse(exp, programs)
    _same_data(folder, exp)
    _write_start(folder, exp)
    agreement.one_workdir(folder, folder / "config.json")
    with checkpoint.Checkpointer(folder / checkpoint.CHECKPOINTS, every=checked["checkpoint"]["every"],
                                 keep=checked["checkpoint"]["keep"]) as saver:
        state, start = restore(exp, saver, programs)
        run_log.cut_back(folder, start)
        _cut_samples(folder, start)
        with contextlib.closing(programs):
            return _Run(exp, programs, folder, saver, profile).go(state, start)


def restore(exp: Experiment, saver: checkpoint.Checkpointer, programs: Programs | None = None) -> tuple[TrainState, int]:
    """The newest intact checkpoint's state and batch, or the first state and 0; `programs` know what a schedule keeps between iterations."""
    abstract = programs.abstract() if programs is not None else exp.start.abstract
    found = saver.restore_latest(saved_items(exp, abstract))
    if found is None:
        first = exp.start.state()
        return first if programs is None else programs.begin(first), 0
    step, items, meta = found
    reads_init = "base" in exp.frozen or exp.config["reference_from"] == "init"  # networks that do not train are not in a checkpoint
    if reads_init and (began := meta.get("init_fingerprint")) and began != exp.provenance.get("init_fingerprint"):
        raise UserError(f"config.init_from = {exp.config['init_from']!r}: its weights are not those that this run was started from, which its frozen "
                        "networks would be read from; put them back, name the step, or choose another --workdir")
    trained = _trained_part(items["params"], layout.to_canonical(abstract.params))
    state = items["rest"].replace(params=trained)
    if any(c is not None and c.unit for c in (exp.spec.policy, exp.spec.reward, exp.spec.critic)):
        runtime = functools.partial(layout.like, running=abstract)
        state = sharding.jit(runtime, exp.mesh, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(state)
    return state, step


def saved_items(exp: Experiment, state: TrainState) -> dict[str, PyTree]:
    """What a run goes on from: its networks under `params`, everything else under `rest`, both in the canonical layout."""
    return {checkpoint.PARAMS: _networks(exp, state.params), "rest": layout.to_canonical(state.replace(params={}))}


def delivered(exp: Experiment, state: TrainState) -> PyTree:
    """The networks that validation judged and later runs start from: the moving average where there is one."""
    return _networks(exp, evaluation_params(state.params, state.opt_state))


def _networks(exp: Experiment, params: PyTree) -> PyTree:
    """Whole networks; of a run whose adapters lie on a checkpoint, the adapters and heads alone."""
    return full_params(params, exp.frozen) if exp.base is None else layout.to_canonical(beside_a_base(params, exp.frozen.get("base", {})))


def _trained_part(full: PyTree, like: PyTree) -> PyTree:
    """The leaves of `full` at the paths of `like`."""
    return {key: _trained_part(full[key], like[key]) if isinstance(like[key], dict) else full[key] for key in like}


class _Samples(NamedTuple):
    """What one iteration may still have to write to samples.jsonl."""

    step: int
    rolled: Rollout | None  # kept where rows of it are shown, or a network may have failed on some
    shown: bool  # its first rows are due
    failures: list[dict[str, Any]]
    transcripts: list[dict[str, Any]]


class _Run:
    """The loop and what it carries from batch to batch besides the state."""

    def __init__(self, exp: Experiment, programs: Programs, folder: epath.Path, saver: checkpoint.Checkpointer, profile: bool) -> None:
        self.exp, self.programs, self.folder, self.saver = exp, programs, folder, saver
        self.validation = exp.config["validation"]
        self.every = exp.config["checkpoint"]["every"]
        # As float32, which the log's text stands for: values read back must equal those measured, or ties would break differently.
        self.history = [(line["step"], float(np.float32(line[self.validation["metric"]]))) for line in run_log.read_metrics(folder)
                        if self.validation["metric"] in line]
        self.samples: _Samples | None = None
        self.profile, self.tracing = profile, False
        self.watchdog = Watchdog(exp.config["run"]["watchdog"])

    def go(self, state: TrainState, start: int) -> Result:
        exp, log = self.exp, self.exp.config["log"]
        where = sharding.row_sharding(exp.mesh)
        fetch = lambda index: distributed.to_global(exp.batch(index), where)  # noqa: E731
        wandb = {"project": log["wandb"], "name": self.folder.name} if log["wandb"] else None
        stopped = "early" if self._exhausted() else "finished"
        step, end = start, start if stopped == "early" else exp.steps
        # Past the last iteration nothing is drawn; how many prompts a refilled batch takes nobody knows before.
        drawn, last = self.programs.drawn(state, start), None if schedule.of(exp.config).refill else end
        with (
            run_log.MetricsLog(self.folder, start_step=start, total_steps=exp.steps, every=log["every"],
                               tensorboard=log["tensorboard"], wandb=wandb, console=distributed.is_lead()) as self.log,
            Prefetcher(fetch, drawn, last, 2) as batches,
            self.watchdog,
        ):
            for step in range(start + 1, end + 1):
                with self.watchdog.watching("a step", step):
                    with self._traced(step - start):
                        state, metrics, rolled = self.programs.advance(state, batches)
                    self._account(self.log.write(step, metrics), step, rolled)
                if self.programs.compilations() > 1:
                    raise AssertionError("the train step was compiled twice: a batch changed its shape or dtype after warm-up")
                improved = self._validate(state, step)
                if improved or self._due(step):
                    with self.watchdog.watching("the save", step, PATIENCE):
                        self._save(state, step, improved)
                if self.saver.reached_preemption(step):
                    stopped = "preempted"
                    break
                if self._exhausted():
                    stopped = "early"
                    break
            self._end_trace()
            with self.watchdog.watching("a step", step):
                self._account(self.log.flush(), step, None)
        return self._finish(state, step, stopped)

    def _finish(self, state: TrainState, step: int, stopped: str) -> Result:
        if step not in self.saver.steps():
            self._save(state, step, improved=False, force=True)
        self.saver.wait()
        skipped = int(state.opt_state.total_notfinite)
        if skipped and skipped == int(state.step):
            raise UserError(f"none of the {skipped} updates was applied: gradients were not finite from the first one on; look at "
                            "config.model, config.optimizer and the data")
        best = self._best()
        result = Result(step, stopped, checkpoint.state_hash(layout.to_canonical(state)), *(best or (None, None)))
        if distributed.is_lead():
            _write_json(self.folder / "final.json", dataclasses.asdict(result))
        return result

    @contextlib.contextmanager
    def _traced(self, number: int) -> Iterator[None]:
        """A profiler trace over a few steps after the first when asked for; no implicit host transfers in any step."""
        if self.profile and number == 2:
            jax.profiler.start_trace(str(self.folder / "profile"))
            self.tracing = True
        with jax.transfer_guard_host_to_device("disallow") if number > 1 else contextlib.nullcontext():
            yield
        if self.tracing and number == 1 + PROFILED:
            self._end_trace()

    def _end_trace(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
        self.profile = self.tracing = False

    def _account(self, values: Mapping[str, float] | None, step: int, rolled: Rollout | None) -> None:
        """Samples of the write before, whose values these are, then what stops the run; keeps this step's rollout for its turn."""
        self._sample(step, rolled, values or {})
        self._watch(values)

    def _watch(self, values: Mapping[str, float] | None) -> None:
        """Stops the run after too many non-finite updates in a row, or a reward that failed; the values are those of the write before."""
        failed, limit = (values or {}).get("reward/failed", 0.0), self.exp.config["run"]["max_nonfinite"]
        if failed > 0 and self.exp.scored and self.exp.config["reward_failure"]["policy"] == "raise":
            raise UserError(f"config.reward_failure.policy = 'raise': a reward network gave {failed:.3g} of the samples no finite number (they are "
                            "in samples.jsonl); look at the reward model, or choose 'mask' or 'default'; the last checkpoint is intact")
        if values is not None and values.get("optimizer/nonfinite_run", 0.0) >= limit:
            raise UserError(f"config.run.max_nonfinite = {limit}: that many updates in a row had non-finite gradients and were skipped; "
                            "lower config.optimizer.lr or look at the data; the last checkpoint is intact")

    def _sample(self, step: int, rolled: Rollout | None, values: Mapping[str, float]) -> None:
        """Writes samples to samples.jsonl, one iteration late, so that the device is never waited for; those without a reward always."""
        log = self.exp.config["log"]
        if self.samples is not None:
            at, previous, shown, failures, transcripts = self.samples
            rows, scores, components = [], None, None
            # On every host, since the rows may lie on another one than the lead.
            if previous is not None and values.get("reward/failed", 0.0) > 0:
                failures = failures + self.programs.network_failures(previous)
            if previous is not None and shown:
                rows = transcripts[: log["samples"]] or completions(self.exp, previous, self.exp.train_data, log["samples"], distributed.all_rows)
                scores, components = (None if x is None else distributed.all_rows(x)[: log["samples"]]
                                      for x in (previous.scores, previous.components))
            if distributed.is_lead():
                with Growing(self.folder / "samples.jsonl") as file:
                    for row in failed_samples(failures, rows, scores, components, self.programs.labels):
                        file.write((json.dumps({"step": at, **row}, ensure_ascii=False) + "\n").encode())
        failures = self.programs.failures if rolled is not None else []
        due = bool(rolled is not None and log["samples"] and (step % log["every"] == 0 or step == self.exp.steps))
        kept = rolled if due or self.programs.by_networks else None
        self.samples = _Samples(step, kept, due, failures, self.programs.transcripts if due else []) if kept is not None or failures else None

    def _due(self, step: int) -> bool:
        return bool(self.every and step % self.every == 0) or self.saver.reached_preemption(step)

    def _validate(self, state: TrainState, step: int) -> bool:
        """Validates when due; True if it was the best so far."""
        every = self.validation["every"]
        if not every or (step % every and step != self.exp.steps):
            return False
        with self.watchdog.watching("the validation", step, PATIENCE):
            values = self.log.write_now(step, self.programs.validate(state))
        self.history.append((step, values[self.validation["metric"]]))
        best = self._best()
        return best is not None and best[0] == step

    def _best(self) -> tuple[int, float] | None:
        """(step, value) of the best validation, the earliest of equals; non-finite ones never win."""
        sign = 1.0 if self.validation["mode"] == "min" else -1.0
        finite = [(step, float(value)) for step, value in self.history if math.isfinite(float(value))]
        return min(finite, key=lambda item: (sign * item[1], item[0])) if finite else None

    def _exhausted(self) -> bool:
        """Whether validation has not improved for `patience` rounds."""
        patience, best = self.validation["patience"], self._best()
        if not patience or best is None:
            return False
        return sum(step > best[0] for step, _ in self.history) >= patience

    def _save(self, state: TrainState, step: int, improved: bool, force: bool = False) -> None:
        exp = self.exp
        # The log first: a kill right after the save must find this step's lines written.
        self._account(self.log.flush(), step, None)
        meta, averaged = self._meta(state, step), exp.config["optimizer"]["ema_decay"] > 0
        # The best one first, and wholly: a run that goes on from `step` will not come by here again.
        if improved:
            with checkpoint.Checkpointer(self.folder / checkpoint.BEST, every=0, keep=1) as best:
                best.save(step, {checkpoint.PARAMS: delivered(exp, state)}, meta, force=True)
        if force or self._due(step):
            ema = {checkpoint.EMA: delivered(exp, state)} if averaged else {}
            self.saver.save(step, saved_items(exp, state) | ema, meta, force=force)

    def _meta(self, state: TrainState, step: int) -> dict[str, Any]:
        exp = self.exp
        network = exp.config["network"]
        meta: dict[str, Any] = {
            "network": network,
            "model": getattr(exp.spec, network).to_json(),
            "step": step,
            "objective": exp.objective.name,
            "tokenizer": exp.tokenizer.digest,
            **exp.provenance,
        }
        if exp.spec.critic is not None:
            meta["critic_model"] = exp.spec.critic.to_json()
        meta["control_tokens"] = exp.tokenizer.control_tokens
        if exp.base is not None:
            meta["base"] = exp.base
        if network == "reward" and exp.valid_data is not None:
            meta |= self.programs.reward_moments(state)
        return meta


def _refuse(exp: Experiment, programs: Programs) -> None:
    """What only tracing can tell, found before anything is written or compiled.

    Raises:
      UserError: an objective without the network or data that it needs, a validation metric that is not measured, a missing W&B.
    """
    measured, section = programs.trace(), exp.config["validation"]
    if section["every"] and section["metric"] not in measured:
        raise UserError(f"config.validation.metric = {section['metric']!r} is not measured{nearest(section['metric'], measured)}")
    if exp.config["log"]["wandb"]:
        run_log.import_wandb()


def _jsonable(value: Any) -> Any:
    """Nested dicts with infinities as text, so that what is written is JSON to every reader."""
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: epath.Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_jsonable(value), indent=2, sort_keys=True) + "\n")
    part.replace(path)


def _same_config(folder: epath.Path, config: Mapping[str, Any]) -> None:
    """A workdir holds one run: going on with another config is refused."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir = {str(folder)!r} is a file: name a folder for this run")
    path, begun = folder / "config.json", folder / checkpoint.CHECKPOINTS
    if not path.exists() or not begun.exists() or not any(step.name.isdigit() for step in begun.iterdir()):
        return  # nothing was trained under that config yet
    saved = json.loads(path.read_text())
    now = json.loads(json.dumps(_jsonable(config)))
    for key, old, new in distributed.differences(saved, now, "config"):
        if not any(f"{key}.".startswith(f"config.{free}.") for free in FREE):
            raise UserError(f"{key} = {new!r}, but the run in {folder} was started with {old!r}: choose another --workdir, or delete that one")


def _data_account(exp: Experiment) -> dict[str, dict[str, Any]]:
    """What became of each file's rows, and the digest of the prepared set."""
    sets = {"train": exp.train_data, "valid": exp.valid_data, "ptx": exp.ptx_data}
    return {name: {"digest": one.prepared.digest, **one.stats} for name, one in sets.items() if one is not None}


def _same_data(folder: epath.Path, exp: Experiment) -> None:
    """A run goes on with the rows that it began with: a file whose content changed under the same name is refused."""
    path = folder / "data.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    for name, account in _data_account(exp).items():
        if name in saved and saved[name]["digest"] != account["digest"]:
            section, key = FILES[name]
            raise UserError(f"config.{section}.{key} = {exp.config[section][key]!r}: its content changed since the run in {folder} was started: "
                            "choose another --workdir, or restore the file")


def _write_start(folder: epath.Path, exp: Experiment) -> None:
    """The workdir's own description: config, tokenizer, template."""
    if not distributed.is_lead():
        return
    folder.mkdir(parents=True, exist_ok=True)
    exp.tokenizer.save(folder / "tokenizer.json")
    (folder / "template.jinja").write_text(exp.template.source)
    _write_json(folder / "config.json", exp.config)
    _write_json(folder / "data.json", _data_account(exp))
    for name, account in _data_account(exp).items():
        skipped = sum(account["skipped"].values())
        if account["truncated"] or skipped or account["identical"]:
            print(f"config.{'.'.join(FILES[name])}: {account['read']} rows read, {account['kept']} kept, {account['truncated']} truncated, "
                  f"{skipped} skipped {dict(account['skipped'])}, {account['identical']} pairs of identical branches, "
                  f"{account['steps_cut']} verdicts on steps cut off", flush=True)


def _cut_samples(folder: epath.Path, step: int) -> None:
    """Drops the samples after `step`, and a torn last line."""
    path = folder / "samples.jsonl"
    if not path.exists() or not distributed.is_lead():
        return
    kept = []
    # Bytes split at \n only: a response may hold U+2028, which splitlines() takes for an end of line, and a torn line half a character.
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    part = path.with_suffix(".part")
    part.write_bytes(b"".join(kept))
    part.replace(path)



