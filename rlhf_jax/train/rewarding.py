"""What scores a run's completions: config.reward_from, config.reward_fn, or the entries of config.rewards.

Flow: each component is a column of raw rewards. Networks that read the policy's own tokens are pure JAX; functions, and reward models with another
tokenizer, read text on the host. Where all are pure JAX the whole score is, and goes into the fused iteration; else the pure columns are computed
in one program, the others on the host, and one more program combines them (rewards.combine). A reward that fails meets config.reward_failure: the
run stops, or the row stays without a score, or gets another number; each such sample goes to the log with the reason. A network that gives no finite
number is told by the metric reward/failed, which the loop reads an iteration late: nobody waits for the device.
Of several hosts each asks the functions about its own rows; a reward model with another tokenizer reads all rows on all of them, as one program.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed, sharding
from rlhf_jax.data.encode import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.models import Networks, NetworkSpec
from rlhf_jax.ops import masking
from rlhf_jax.rewards import entries, host, implicit, learned
from rlhf_jax.rewards.combine import Share, combine
from rlhf_jax.saved import Source
from rlhf_jax.train import online
from rlhf_jax.train.assemble import Experiment
from rlhf_jax.types import Array, Mean, PyTree, Rollout

RETOKENISED_BUCKET = 32  # tokens; rows for a reward model with another tokenizer are padded to multiples of it
LOGGED = 16  # samples without a reward that one iteration writes to the log
Rows = list[dict[str, Any]]  # from `completions`


@dataclasses.dataclass(frozen=True)
class Column:
    """One component: `pure(frozen, rollout) -> [B]`, or `on_host(rows, references) -> ([B], reasons by row)`."""

    share: Share
    pure: Callable[[PyTree, Rollout], Array] | None = None
    on_host: Callable[[Rows, list[Any]], tuple[np.ndarray, dict[int, str]]] | None = None
    asks_device: bool = False  # on_host runs programs of its own, which must keep one order on all devices; it wants the rows of all hosts


class Reading(NamedTuple):
    """What the rewards that read text said of this host's rows of a rollout."""

    columns: np.ndarray  # [B_host, C'] float32
    failures: Rows  # samples without a reward, each with its `row` and `failed`: {label: reason}
    error: str | None = None  # why the run must stop, said on one of several hosts


class Rewards:
    """The score of a run's completions.

    Args:
      exp: assembled, with a reward.

    Raises:
      UserError: a function that cannot be loaded, or a reward model without the moments that are asked for.
    """

    def __init__(self, exp: Experiment) -> None:
        self._exp = exp
        self._failure = failure = exp.config["reward_failure"]
        self._default = failure["default"] if failure["policy"] == "default" else None
        self._parts = entries.parse(exp.config["rewards"])
        self._columns = self._build()
        self.pure = all(column.pure is not None for column in self._columns)
        self.by_networks = any(column.pure is not None for column in self._columns)
        # What each reward gave: where there are several, or where the default would hide what a network failed on.
        self._kept = bool(self._parts) or (self._default is not None and self.by_networks)
        self.detached = not any(column.asks_device for column in self._columns)  # `read` runs no program
        self.failures: Rows = []  # of the last `measure`

    def score(self, params: PyTree, frozen: PyTree, rollout: Rollout) -> tuple[Rollout, dict[str, Mean]]:
        """The rollout with its scores, and metrics, pure JAX; for rewards that are.

        Args:
          params: what trains; no reward reads it.
          frozen: the run's.
          rollout: [B, T].
        """
        chex.assert_rank(rollout.seqs.tokens, 2)
        scores, components, metrics = self._values(False, frozen, rollout, None)
        return rollout.replace(scores=scores, components=components), metrics

    def measure(
        self, frozen: PyTree, rollout: Rollout, prompts: Any, *, validation: bool = False, reading: Reading | None = None
    ) -> tuple[Rollout, dict[str, Mean]]:
        """The same in a program of its own; where some read text, it waits for the samples.

        Args:
          frozen: the run's.
          rollout: [B, T], on the mesh.
          prompts: the set that the rollout's prompt ids belong to.
          validation: components are not normalised over the batch, and failures are not kept for the log.
          reading: what `read` made of the rollout, if it has been called.
        """
        chex.assert_rank(rollout.seqs.tokens, 2)
        columns = None
        if not self.pure:
            reading = self._agreed(reading or self.read(rollout, prompts))
            if not validation:
                self.failures = reading.failures
            columns = distributed.to_global(reading.columns, sharding.row_sharding(self._exp.mesh))
        scores, components, metrics = self._jitted(validation)(frozen, rollout, columns)
        return rollout.replace(scores=scores, components=components), metrics

    def read(self, rollout: Rollout, prompts: Any) -> Reading:
        """What the rewards that read text say of a rollout; waits for it. Where `detached`, it may run in another thread.

        Args:
          rollout: [B, T].
          prompts: the set that the rollout's prompt ids belong to.
        """
        chex.assert_rank(rollout.seqs.tokens, 2)
        numbers = sharding.row_numbers(self._exp.mesh, rollout.truncated.shape[0])
        fetch = distributed.own_rows if self.detached else distributed.all_rows
        rows = completions(self._exp, rollout, prompts, fetch=fetch)
        references = [prompts.reference(row["prompt_id"]) if row["messages"] is not None else None for row in rows]
        read: dict[int, np.ndarray] = {}
        if not self.detached:  # programs first: what a function of one host raises must not keep it from them
            asking = {i: column.on_host for i, column in enumerate(self._columns) if column.on_host is not None and column.asks_device}
            read |= {i: ask(rows, references)[0][numbers] for i, ask in asking.items()}
            rows, references = [rows[i] for i in numbers], [references[i] for i in numbers]
        reasons: dict[int, dict[str, str]] = {}
        try:
            for i, column in enumerate(self._columns):
                if column.on_host is not None and not column.asks_device:
                    read[i], failed = column.on_host(rows, references)
                    for row, reason in failed.items():
                        reasons.setdefault(row, {})[column.share.label] = reason
        except UserError as error:
            if distributed.hosts() == 1:
                raise
            return Reading(np.zeros((len(rows), 0), np.float32), [], str(error))
        failures = [{**rows[row], "row": int(numbers[row]), "failed": why} for row, why in sorted(reasons.items())]
        return Reading(np.stack([read[i] for i in sorted(read)], axis=-1).astype(np.float32), failures)

    def _agreed(self, reading: Reading) -> Reading:
        """The reading with the failures of all hosts; where two hosts hold the same rows, both take what the first says of them. A collective."""
        if distributed.hosts() == 1:
            return reading
        distributed.raise_together(reading.error)
        failures = sorted(itertools.chain(*distributed.exchange(reading.failures[:LOGGED])), key=lambda sample: sample["row"])
        blocks = [sharding.host_rows(self._exp.mesh, number)[0] for number in range(distributed.hosts())]
        columns = reading.columns
        if len(set(blocks)) < len(blocks):
            (columns, *_) = (theirs for theirs, held in zip(distributed.gathered(columns), blocks) if held == sharding.host_rows(self._exp.mesh)[0])
            failures = list({sample["row"]: sample for sample in failures}.values())
        return Reading(columns, failures)

    @functools.cache  # noqa: B019  one object a run
    def _jitted(self, validation: bool) -> Any:
        return sharding.jit(functools.partial(self._values, validation), self._exp.mesh)

    def _values(self, validation: bool, frozen: PyTree, rollout: Rollout, read: Array | None) -> tuple[Array, Array | None, dict[str, Mean]]:
        """Scores [B]; the components as they were given [B, C], where config.rewards lists them; metrics."""
        given = iter(() if read is None else jnp.moveaxis(read, -1, 0))
        raw = jnp.stack([next(given) if column.pure is None else column.pure(frozen, rollout) for column in self._columns], axis=-1)
        shares = [column.share for column in self._columns]
        scores, metrics = combine(raw, rollout.real, shares, default=self._default, batch_moments=not validation)
        # The short form has one component, which objective/score shows.
        return scores, raw if self._kept else None, metrics if self._parts else {"reward/failed": metrics["reward/failed"]}

    def shapes(self, rolled: Rollout) -> Rollout:
        """A rollout's shapes with those of its scores.

        Args:
          rolled: shapes, or arrays.
        """
        chex.assert_rank(rolled.truncated, 1)
        rows = rolled.truncated.shape
        components = jax.ShapeDtypeStruct((*rows, len(self._columns)), jnp.float32) if self._kept else None
        return rolled.replace(scores=jax.ShapeDtypeStruct(rows, jnp.float32), components=components)

    def network_failures(self, rolled: Rollout, prompts: Any) -> Rows:
        """The samples of a scored rollout to which a network gave no finite number, as `Reading.failures`; waits for it.

        Args:
          rolled: [B, T], from `score` or `measure`.
          prompts: the set that the rollout's prompt ids belong to.
        """
        chex.assert_rank(rolled.truncated, 1)
        assert rolled.scores is not None
        given = distributed.all_rows(rolled.scores if rolled.components is None else rolled.components).reshape(-1, len(self._columns))
        asked = [(number, column.share.label) for number, column in enumerate(self._columns) if column.pure is not None]
        found = []
        for row, sample in enumerate(completions(self._exp, rolled, prompts, fetch=distributed.all_rows)):
            reasons = {label: f"gave {given[row, number]}" for number, label in asked if not np.isfinite(given[row, number])}
            if reasons and sample["messages"] is not None:
                found.append({**sample, "row": row, "failed": reasons})
        return found

    @property
    def labels(self) -> list[str]:
        """Of `Rollout.components`."""
        return [column.share.label for column in self._columns]

    def _build(self) -> list[Column]:
        config = self._exp.config
        if config["reward_fn"]:
            function = entries.load_function(config["reward_fn"], "config.reward_fn")
            return [Column(Share("score"), on_host=self._function(function, "config.reward_fn", each=False))]
        if self._exp.reward is not None:
            on = "config.reward_normalise is on, but config.reward_from"
            mean, std = _moments(self._exp.reward, on) if config["reward_normalise"] else (0.0, 1.0)
            score = online.make_score(self._exp.spec, mean, std)
            tree = lambda frozen: frozen["reward"]  # noqa: E731
            return [self._learned(Share("score"), self._exp.reward, self._exp.spec, "config.reward_from", tree,
                                  lambda frozen, rollout: score({}, frozen, rollout)[0].scores, (mean, std))]
        return [self._column(entry) for entry in self._parts]

    def _column(self, entry: entries.Entry) -> Column:
        share, label = entry.share, entry.share.label
        if entry.function is not None:
            return Column(share, on_host=self._function(entry.function, entry.key, each=entry.each))
        roles = self._exp.rewards[label]
        specs = {role: NetworkSpec(reward=one.config) if role == "reward" else NetworkSpec(ref=one.config) for role, one in roles.items()}

        def network(frozen: PyTree, role: str) -> Networks:
            return Networks({}, {"reward" if role == "reward" else "ref": frozen["rewards"][label][role]}, specs[role])

        if entry.name == "implicit":
            beta = float(entry.parameters["beta"])
            return Column(share, pure=lambda frozen, rollout: implicit.score(
                network(frozen, "policy"), network(frozen, "reference"), rollout, beta=beta))
        source, where = roles["reward"].source, f"{entry.key}.run"
        if entry.stored:
            share = dataclasses.replace(share, moments=_moments(source, f"{entry.key}.normalise = 'stored', but {where}"))
        tree = lambda frozen: frozen["rewards"][label]["reward"]  # noqa: E731
        return self._learned(share, source, specs["reward"], where, tree,
                             lambda frozen, rollout: learned.score(network(frozen, "reward"), rollout), (0.0, 1.0))

    def _learned(self, share: Share, source: Source, spec: NetworkSpec, key: str, tree: Callable[[PyTree], PyTree],
                 pure: Callable[[PyTree, Rollout], Array], moments: tuple[float, float]) -> Column:
        """On the policy's own tokens where tokenizer and template are the same, else on text."""
        exp, template = self._exp, source.template
        if source.reader(key).digest == exp.tokenizer.digest and (template is None or template.digest == exp.template.digest):
            return Column(share, pure=pure)
        assert spec.reward is not None

        def score(frozen: PyTree, seqs: Any) -> Array:
            scores = Networks({}, {"reward": tree(frozen)}, spec).reward(seqs).scores
            return learned.normalise(masking.at_last_real(scores, seqs.segment_ids), *moments)

        jitted, where = sharding.jit(score, exp.mesh, out_shardings=sharding.replicated(exp.mesh)), sharding.row_sharding(exp.mesh)
        own = lambda seqs: jax.tree.map(lambda x: x[sharding.row_numbers(exp.mesh, len(x))], seqs)  # noqa: E731
        encoder = Encoder(source.reader(key), source.layout(key), max_length=spec.reward.context, prompt_length=None, overlong="truncate")
        reward = host.RetokenisedReward(encoder, lambda seqs: jitted(exp.frozen, distributed.to_global(own(seqs), where)), bucket=RETOKENISED_BUCKET)

        def on_host(rows: Rows, references: list[Any]) -> tuple[np.ndarray, dict[int, str]]:
            scores = reward([row["messages"] for row in rows], [row["response"] for row in rows], [row["ended"] for row in rows])
            failed = {int(row): f"gave {scores[row]}" for row in np.flatnonzero(~np.isfinite(scores))}
            if failed and self._failure["policy"] == "raise":
                first = min(failed)
                raise UserError(f"{key} = {source.path!r} {failed[first]} for the response {rows[first]['response'][:80]!r}; look at the reward "
                                "model, or set config.reward_failure.policy to go on")
            return scores, failed

        return Column(share, on_host=on_host, asks_device=True)

    def _function(self, function: host.RewardFn, key: str, *, each: bool) -> Callable[[Rows, list[Any]], tuple[np.ndarray, dict[int, str]]]:
        """A function on the real rows; 0 on filler rows."""

        def on_host(rows: Rows, references: list[Any]) -> tuple[np.ndarray, dict[int, str]]:
            real = [number for number, row in enumerate(rows) if row["messages"] is not None]
            failures: dict[int, str] | None = None if self._failure["policy"] == "raise" else {}
            values = np.zeros(len(rows), np.float32)
            values[real] = host.call_reward_fn(
                function, [rows[i]["messages"] for i in real], [rows[i]["response"] for i in real], [references[i] for i in real], key=key,
                failures=failures, timeout=self._failure["timeout"], each=each,
            )
            return values, {real[number]: reason for number, reason in (failures or {}).items()}

        return on_host


def _moments(source: Source, asked: str) -> tuple[float, float]:
    if "reward_mean" not in source.meta:
        raise UserError(f"{asked} = {source.path!r} stores no reward_mean and reward_std: train it with a validation file, or switch it off")
    return float(source.meta["reward_mean"]), float(source.meta["reward_std"])


def completions(
    exp: Experiment, rolled: Rollout, prompts: Any, limit: int | None = None, fetch: Callable[[Any], np.ndarray] = distributed.own_rows
) -> Rows:
    """The rollout's rows as text: prompt messages (None on filler rows), response without special tokens, whether it ended by itself.
    Waits for the device.

    Args:
      exp: for the tokenizer.
      rolled: [B, T].
      prompts: the set that the rollout's prompt ids belong to.
      limit: first rows only.
      fetch: distributed.own_rows or all_rows.
    """
    chex.assert_rank([rolled.seqs.tokens, rolled.prompt_ids], [2, 1])
    tokens, segments, mask, ids, truncated = (
        fetch(x)[:limit]
        for x in (rolled.seqs.tokens, rolled.seqs.segment_ids, rolled.seqs.loss_mask, rolled.prompt_ids, rolled.truncated)
    )
    real = (segments != 0).any(-1)  # on the host: the loop's transfer guard forbids eager arithmetic on the device
    return [
        {
            "prompt_id": int(ids[b]), "messages": list(prompts.messages(int(ids[b]))) if real[b] else None, "ended": not bool(truncated[b]),
            "response": exp.tokenizer.decode(tokens[b][mask[b]]),
        }
        for b in range(len(ids))
    ]


def failed_samples(
    failures: Rows, rows: Rows, scores: np.ndarray | None, components: np.ndarray | None = None, labels: Sequence[str] = ()
) -> list[Mapping[str, Any]]:
    """Samples for the log: `rows`, those that failed with the reason, and after them others that failed, LOGGED of them at most.

    Args:
      failures: `Rewards.failures` of the iteration; one that has no `row` is of no row of the rollout.
      rows: the first rows of the rollout.
      scores: of these rows, NaN where there is none; None without a reward.
      components: [B, C], each reward as it was given, not finite where it failed; None: not logged.
      labels: C.
    """
    reasons: dict[int, dict[str, str]] = {}
    for failure in failures:
        if "row" in failure:
            reasons.setdefault(failure["row"], {}).update(failure["failed"])
    found: list[Mapping[str, Any]] = []
    for number, row in enumerate(rows):
        score = {} if scores is None else {"score": _said(scores[number])}
        parts = {} if components is None else {"rewards": {label: _said(value) for label, value in zip(labels, components[number], strict=True)}}
        found.append({**row, **score, **parts, **({"failed": reasons[number]} if number in reasons else {})})
    for failure in failures[:LOGGED]:
        if failure.get("row", len(rows)) >= len(rows):
            found.append({key: value for key, value in failure.items() if key != "row"})
    return found


def _said(value: Any) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
