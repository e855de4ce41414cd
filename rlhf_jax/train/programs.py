"""The compiled programs of a run: one that advances the state by a batch, one that validates, one that reads reward scores.


Offline: the step. Online with a JAX reward, or with none: rollout, score and step as one program. Online with a host reward, an environment, or a
schedule that keeps rollouts waiting: rollout and step apart, what lies between in train.rollouts. All have the same signature,
`(state, batches) -> (state, metrics, rollout | None)`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed, sampling, sharding
from rlhf_jax.models import Networks
from rlhf_jax.ops import masking
from rlhf_jax.rewards import learned
from rlhf_jax.train import online, schedule
from rlhf_jax.train.assemble import Experiment
from rlhf_jax.train.multi_turn import Episodes
from rlhf_jax.train.optimizer import evaluation_params
from rlhf_jax.train.rewarding import Rewards
from rlhf_jax.train.rollouts import Online, Rollouts
from rlhf_jax.train.step import fill_reference, make_step
from rlhf_jax.types import Array, Comparisons, Labelled, Mean, Prompts, Purpose, PyTree, Rollout, TrainState, merged, settled

ONLINE_VALIDATION = ("objective/score", "rollout/length", "rollout/truncated")  # measured on fresh samples


class Programs:
    """Jits lazily what `exp` needs; `advance` is the train step, `validate` the validation."""

    def __init__(self, exp: Experiment) -> None:
        self.exp = exp
        run, plan = exp.config["run"], schedule.of(exp.config)
        step: Callable[..., Any] = make_step(
            exp.objective, exp.spec, exp.optimizer, exp.rate, microbatches=run["microbatches"], epochs=run["epochs"],
            minibatches=run["minibatches"], critic_only=plan.critic_only,
        )
        self._traces = 0
        self._rewards: Rewards | None = None
        self._episodes: Episodes | None = None
        self.rollouts: Rollouts | None = None
        shardings = exp.start.shardings
        if exp.online:
            options = exp.config["sampling"]
            assert exp.spec.policy is not None
            filters = sampling.filters.build(options["filters"], options["stop_strings"], tokenizer=exp.tokenizer,
                                             vocab_size=exp.spec.policy.vocab_size)
            rollout = functools.partial(
                online.make_rollout, exp.spec, options, stop_ids=exp.tokenizer.stop_ids, pad_id=exp.tokenizer.pad_id, filters=filters
            )
            self.rollout = rollout()  # the policy alone, which is what validation measures
            parts = run["microbatches"] * run["minibatches"] * sharding.row_devices(exp.mesh)
            forked = run["batch_size"] // options["group_size"] % parts == 0
            contested = rollout(opponent=exp.objective.opponent, group_size=options["group_size"], forked=forked)
            self._episodes = Episodes(exp, filters, forked=forked) if exp.environment else None
            self._rewards = Rewards(exp) if exp.scored and self._episodes is None else None
            self.rollouts = Rollouts(exp, contested, self._rewards, self._episodes)
            if self.fused:
                step = online.fuse(contested, self._rewards.score if self._rewards else None, step)
            if plan.refresh:
                step = online.refreshed(step, plan.refresh)
                shardings = shardings.replace(online=Online(reference=shardings.params["policy"]))
        out = (shardings, None, None) if self.fused else (shardings, None)
        self._step = sharding.jit(self._counted(step), exp.mesh, donate=(0,), out_shardings=out)

    def advance(self, state: TrainState, batches: Iterator[PyTree]) -> tuple[TrainState, dict[str, Mean], Rollout | None]:
        """One batch, or a whole RL iteration, which takes as many batches of prompts as its schedule says. `state`'s buffers are donated."""
        frozen = self.exp.frozen
        if self.rollouts is None:
            state, metrics = self._step(state, frozen, next(batches))
            return state, metrics, None
        if self.fused:
            return self._step(state, frozen, next(batches))
        rolled, found, kept = self.rollouts.take(state, batches)
        state, metrics = self._step(for_step(state), frozen, rolled)
        if kept is not None:
            state = state.replace(online=kept.replace(reference=state.online.reference if state.online else None))
        return state, {**metrics, **found}, self.rollouts.fresh

    def begin(self, state: TrainState) -> TrainState:
        """A run's first state, with what its schedule keeps between iterations."""
        return state if self.rollouts is None else self.rollouts.begin(state)

    def abstract(self) -> TrainState:
        """The shapes of the state after any iteration, on their shardings."""
        state = self.exp.start.abstract
        return state if self.rollouts is None else state.replace(online=self.rollouts.abstract(state))

    def drawn(self, state: TrainState, iteration: int) -> int:
        """How many batches were drawn before this iteration: where `advance` goes on."""
        return iteration if state.online is None or state.online.cursor is None else int(jax.device_get(state.online.cursor))

    def close(self) -> None:
        """Lets go of what runs beside the devices."""
        if self.rollouts is not None:
            self.rollouts.close()

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The samples of the last `advance` that a reward function or an environment failed on, with the reasons."""
        return self.rollouts.failures if self.rollouts is not None else []

    @property
    def by_networks(self) -> bool:
        """Whether a reward is a network on the policy's own tokens: what it fails on only its scores tell."""
        return self._rewards is not None and self._rewards.by_networks

    def network_failures(self, rolled: Rollout) -> list[dict[str, Any]]:
        """The samples of a rollout from `advance` that a reward network failed on; waits for it."""
        chex.assert_rank(rolled.truncated, 1)
        return self._rewards.network_failures(rolled, self.exp.train_data) if self._rewards is not None else []

    @property
    def labels(self) -> list[str]:
        """Of a rollout's `components`."""
        return self._rewards.labels if self._rewards is not None else []

    @property
    def transcripts(self) -> list[dict[str, Any]]:
        """The conversations of the last `advance`, row by row; none without an environment."""
        return self._episodes.transcripts if self._episodes is not None else []

    def trace(self) -> set[str]:
        """Traces the step and the validation on shapes alone, compiling nothing; the later calls reuse the traces.

        Returns:
          Names of the metrics that a validation measures.

        Raises:
          UserError: whatever the objective or the networks refuse while they are traced.
        """
        exp, state = self.exp, self.abstract()
        batch = self.rollouts.handed_out(state) if self.rollouts is not None and not self.fused else sharding.global_shapes(exp.batch(0), exp.mesh)
        self._step.eval_shape(for_step(state), exp.frozen, batch)
        if exp.valid_data is None:
            return set()
        if exp.scored:
            return {f"eval/{name}" for name in ONLINE_VALIDATION}
        held_out = sharding.global_shapes(next(iter(exp.valid_data.eval_batches())), exp.mesh)
        found = self._validate.eval_shape(state.params, state.opt_state, state.carry, self._frozen(state), state.key, held_out)
        return {f"eval/{name}" for name in found}

    @property
    def step(self) -> Any:
        """The jitted `(state, frozen, batch) -> (state, metrics[, rollout])` that trains: the step, or a whole iteration."""
        return self._step

    @property
    def rewards(self) -> Rewards | None:
        """What scores completions, outside environments."""
        return self._rewards

    @property
    def fused(self) -> bool:
        """Whether rollout, scores and step are one program."""
        if not self.exp.online or self._episodes is not None or schedule.of(self.exp.config).staged:
            return False
        return (self._rewards is None or self._rewards.pure) and self.exp.config["fused"]

    def _frozen(self, state: TrainState) -> PyTree:
        return self.exp.frozen if self.rollouts is None else self.rollouts.frozen(state)

    def compilations(self) -> int:
        """How often the train step was traced for compilation; more than once after warm-up is a bug. (The jit's own `_cache_size` counts
        its dispatch entries: several for one program on more than one device.)"""
        return self._traces + (self._episodes.compilations() if self._episodes is not None else 0)

    def _counted(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, whose body runs once per trace."""

        @functools.wraps(fn)
        def counted(*args: Any) -> Any:
            self._traces += 1
            return fn(*args)

        return counted

    # --- validation ---

    @functools.cached_property
    def _validate(self) -> Any:
        exp = self.exp

        def held_out(params: PyTree, opt_state: PyTree, carry: PyTree, frozen: PyTree, key: Array, batch: PyTree) -> dict[str, Mean]:
            nets = Networks(evaluation_params(params, opt_state), frozen, exp.spec)
            if exp.online:
                batch = self._held_out_samples(nets.params, frozen, batch, key)
            batch = fill_reference(nets, batch)
            batch, _, prepared = exp.objective.prepare(nets, batch, carry, key)
            terms, metrics = exp.objective.loss(nets, batch, None)
            return {**prepared, **settled(metrics), **{f"loss/{name}": term for name, term in terms.items()}}

        return sharding.jit(held_out, exp.mesh)

    def _held_out_samples(self, params: PyTree, frozen: PyTree, prompts: Prompts, key: Array) -> Rollout:
        """Fresh samples, the same at every validation but for the weights."""
        return self.rollout(params, frozen, prompts, jax.random.fold_in(key, Purpose.VALIDATION), jnp.int32(0))

    def validate(self, state: TrainState) -> dict[str, Mean]:
        """Metrics over the validation set, named `eval/…`: the objective's own, or where samples are scored the mean score of fresh ones."""
        limit = self.exp.config["validation"]["batches"] or None
        total: dict[str, Mean] = {}
        for batch in itertools.islice(self.exp.valid_data.eval_batches(), limit):
            placed = distributed.to_global(batch, sharding.row_sharding(self.exp.mesh))
            found = self._validate_online(state, placed) if self.exp.scored else self._validate(
                state.params, state.opt_state, state.carry, self._frozen(state), state.key, placed
            )
            total = merged(total, found)
        return {f"eval/{name}": mean for name, mean in total.items()}

    def _validate_online(self, state: TrainState, prompts: Prompts) -> dict[str, Mean]:
        params = evaluation_params(state.params, state.opt_state)
        if self._episodes is not None:
            # On the whole mesh, as a training step's are, or the turns would be traced again.
            key, first = jax.device_put((jax.random.fold_in(state.key, Purpose.VALIDATION), jnp.int32(0)), sharding.replicated(self.exp.mesh))
            rolled, _ = self._episodes.play(params, self.exp.frozen, prompts, key, first, self.exp.valid_data, validation=True)
        else:
            rolled = self._validation_rollout(params, self.exp.frozen, prompts, state.key)
            assert self._rewards is not None and self.rollouts is not None
            reading = self.rollouts.read(rolled, self.exp.valid_data)
            rolled, _ = self._rewards.measure(self.exp.frozen, rolled, self.exp.valid_data, validation=True, reading=reading)
        assert rolled.scores is not None
        scores = rolled.scores
        length = rolled.seqs.loss_mask.sum(-1)
        masks = (rolled.real & ~jnp.isnan(scores), rolled.real, rolled.real)
        return {name: Mean.of(values, mask) for name, values, mask in zip(ONLINE_VALIDATION, (scores, length, rolled.truncated), masks)}

    @functools.cached_property
    def _validation_rollout(self) -> Any:
        return sharding.jit(self._held_out_samples, self.exp.mesh, out_shardings=sharding.row_sharding(self.exp.mesh))

    def reward_moments(self, state: TrainState) -> dict[str, float]:
        """Mean and standard deviation of a reward model's scores over the validation set's responses, for its checkpoint's meta."""
        scores, limit = [], self.exp.config["validation"]["batches"] or None
        for batch in itertools.islice(self.exp.valid_data.eval_batches(), limit):
            placed = distributed.to_global(batch, sharding.row_sharding(self.exp.mesh))
            found, real = jax.device_get(self._response_scores(state.params, state.opt_state, self.exp.frozen, placed))
            scores.append(found[real])
        mean, std = learned.reference_moments(np.concatenate(scores))
        return {"reward_mean": mean, "reward_std": std}

    @functools.cached_property
    def _response_scores(self) -> Any:
        def read(params: PyTree, opt_state: PyTree, frozen: PyTree, batch: Comparisons | Labelled) -> tuple[Array, Array]:
            nets = Networks(evaluation_params(params, opt_state), frozen, self.exp.spec)
            return masking.at_last_real(nets.reward(batch.seqs).scores, batch.seqs.segment_ids), batch.seqs.real

        return sharding.jit(read, self.exp.mesh, out_shardings=sharding.replicated(self.exp.mesh))  # every host computes the moments




def for_step(state: TrainState) -> TrainState:
    """The state as the update takes it: rollouts in flight and memory stay behind, undonated.

    Args:
      state: the run's, or its shapes.
    """
    chex.assert_rank(state.batch_index, 0)
    online = state.online
    return state.replace(online=Online(reference=online.reference) if online is not None and online.reference is not None else None)
