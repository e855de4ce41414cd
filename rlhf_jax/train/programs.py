"""The compiled programs of a run: one that advances the state by a batch, one that validates, one that reads reward scores.

Offline: the step. Online with a JAX reward, or with none: rollout, score and step as one program. Online with a host reward: rollout and step
apart, the reward between (train.rewarding). All have the same signature, `(state, batch) -> (state, metrics, rollout | None)`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from rlhf_jax import distributed, sampling, sharding
from rlhf_jax.models import Networks
from rlhf_jax.ops import masking
from rlhf_jax.rewards import learned
from rlhf_jax.train import online
from rlhf_jax.train.assemble import Experiment
from rlhf_jax.train.optimizer import evaluation_params
from rlhf_jax.train.rewarding import Rewards
from rlhf_jax.train.step import fill_reference, make_step
from rlhf_jax.types import Array, Comparisons, Labelled, Mean, Prompts, Purpose, PyTree, Rollout, TrainState, settled

ONLINE_VALIDATION = ("objective/score", "rollout/length", "rollout/truncated")  # measured on fresh samples


class Programs:
    """Jits lazily what `exp` needs; `advance` is the train step, `validate` the validation."""

    def __init__(self, exp: Experiment) -> None:
        self.exp = exp
        run = exp.config["run"]
        step = make_step(
            exp.objective, exp.spec, exp.optimizer, exp.rate, microbatches=run["microbatches"], epochs=run["epochs"],
            minibatches=run["minibatches"],
        )
        self._traces = 0
        self._rewards: Rewards | None = None
        jit_state = functools.partial(sharding.jit, mesh=exp.mesh, donate=(0,))
        if not exp.online:
            self._step = jit_state(self._counted(step), out_shardings=(exp.start.shardings, None))
        else:
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
            self._rollout = sharding.jit(contested, exp.mesh)
            self._rewards = Rewards(exp) if exp.scored else None
            if self._fused:
                fused = online.fuse(contested, self._rewards.score if self._rewards else None, step)
                self._step = jit_state(self._counted(fused), out_shardings=(exp.start.shardings, None, None))
            else:
                self._step = jit_state(self._counted(step), out_shardings=(exp.start.shardings, None))

    def advance(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Mean], Rollout | None]:
        """One batch: an update, or a whole RL iteration. `state`'s buffers are donated."""
        frozen = self.exp.frozen
        if not self.exp.online:
            state, metrics = self._step(state, frozen, batch)
            return state, metrics, None
        if self._fused:
            return self._step(state, frozen, batch)
        rolled = self._rollout(state.params, frozen, batch, state.key, state.batch_index)
        found: dict[str, Mean] = {}
        if self._rewards is not None:
            scores, found = self._scores(state.params, rolled, self.exp.train_data, validation=False)
            rolled = rolled.replace(scores=scores)
        state, metrics = self._step(state, frozen, rolled)
        return state, {**metrics, **found}, rolled

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The samples of the last `advance` that a reward function failed on, with the reasons."""
        return self._rewards.failures if self._rewards is not None else []

    def trace(self) -> set[str]:
        """Traces the step and the validation on shapes alone, compiling nothing; the later calls reuse the traces.

        Returns:
          Names of the metrics that a validation measures.

        Raises:
          UserError: whatever the objective or the networks refuse while they are traced.
        """
        exp, state = self.exp, self.exp.start.abstract
        where = sharding.row_sharding(exp.mesh)
        batch = _shapes(exp.batch(0), where)
        if exp.online and not self._fused:
            rolled = self._rollout.eval_shape(state.params, exp.frozen, batch, state.key, state.batch_index)
            if exp.scored:
                rolled = rolled.replace(scores=jax.ShapeDtypeStruct(rolled.truncated.shape, jnp.float32))
            batch = jax.tree.map(sharding.placed, rolled, jax.tree.map(lambda _: where, rolled))
        self._step.eval_shape(state, exp.frozen, batch)
        if exp.valid_data is None:
            return set()
        if exp.scored:
            return {f"eval/{name}" for name in ONLINE_VALIDATION}
        held_out = _shapes(next(iter(exp.valid_data.eval_batches())), where)
        found = self._validate.eval_shape(state.params, state.opt_state, state.carry, exp.frozen, state.key, held_out)
        return {f"eval/{name}" for name in found}

    @property
    def _fused(self) -> bool:
        return (self._rewards is None or self._rewards.pure) and self.exp.config["fused"]

    def compilations(self) -> int:
        """How often the train step was traced for compilation; more than once after warm-up is a bug. (The jit's own `_cache_size` counts
        its dispatch entries: several for one program on more than one device.)"""
        return self._traces

    def _counted(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, whose body runs once per trace."""

        @functools.wraps(fn)
        def counted(*args: Any) -> Any:
            self._traces += 1
            return fn(*args)

        return counted

    def _scores(self, params: PyTree, rolled: Rollout, prompts: Any, *, validation: bool) -> tuple[Array, dict[str, Mean]]:
        assert self._rewards is not None
        if self._rewards.pure:
            return (self._validation_score if validation else self._score)(params, self.exp.frozen, rolled)
        return self._rewards.measure(self.exp.frozen, rolled, prompts, validation=validation)

    @functools.cached_property
    def _score(self) -> Any:
        assert self._rewards is not None
        return sharding.jit(self._rewards.score, self.exp.mesh)

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
                state.params, state.opt_state, state.carry, self.exp.frozen, state.key, placed
            )
            total = {name: total[name].merge(mean) if name in total else mean for name, mean in found.items()}
        return {f"eval/{name}": mean for name, mean in total.items()}

    def _validate_online(self, state: TrainState, prompts: Prompts) -> dict[str, Mean]:
        params = evaluation_params(state.params, state.opt_state)
        rolled = self._validation_rollout(params, self.exp.frozen, prompts, state.key)
        scores, _ = self._scores(params, rolled, self.exp.valid_data, validation=True)
        length = rolled.seqs.loss_mask.sum(-1)
        masks = (rolled.real & ~jnp.isnan(scores), rolled.real, rolled.real)
        return {name: Mean.of(values, mask) for name, values, mask in zip(ONLINE_VALIDATION, (scores, length, rolled.truncated), masks)}

    @functools.cached_property
    def _validation_rollout(self) -> Any:
        return sharding.jit(self._held_out_samples, self.exp.mesh)

    @functools.cached_property
    def _validation_score(self) -> Any:
        assert self._rewards is not None
        return sharding.jit(functools.partial(self._rewards.score, validation=True), self.exp.mesh)

    def reward_moments(self, state: TrainState) -> dict[str, float]:
        """Mean and standard deviation of a reward model's scores over the validation set's responses, for its checkpoint's meta."""
        scores, limit = [], self.exp.config["validation"]["batches"] or None
        for batch in itertools.islice(self.exp.valid_data.eval_batches(), limit):
            placed = distributed.to_global(batch, sharding.row_sharding(self.exp.mesh))
            found = self._response_scores(state.params, state.opt_state, self.exp.frozen, placed)
            scores.append(np.asarray(found)[np.asarray(batch.seqs.real)])
        mean, std = learned.reference_moments(np.concatenate(scores))
        return {"reward_mean": mean, "reward_std": std}

    @functools.cached_property
    def _response_scores(self) -> Any:
        def read(params: PyTree, opt_state: PyTree, frozen: PyTree, batch: Comparisons | Labelled) -> Array:
            nets = Networks(evaluation_params(params, opt_state), frozen, self.exp.spec)
            return masking.at_last_real(nets.reward(batch.seqs).scores, batch.seqs.segment_ids)

        return sharding.jit(read, self.exp.mesh)


def _shapes(batch: PyTree, where: NamedSharding) -> PyTree:
    """This host's rows of a batch as the shapes of the global one."""
    _, hosts = distributed.host()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] * hosts, *x.shape[1:]), x.dtype, sharding=where), batch)
