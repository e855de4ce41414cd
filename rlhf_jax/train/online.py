"""Online RL as pure stages: rollout → score → step, the same step as offline.

When the reward is a JAX function the three compose into one jitted iteration. When it needs the host (a Python verifier, a reward model
with another tokenizer) the same rollout and step run with the host between. Same functions, two compositions: the same tokens, the same
updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import sampling
from rlhf_jax.models import Networks, NetworkSpec
from rlhf_jax.ops import rows
from rlhf_jax.rewards import learned
from rlhf_jax.types import Array, Mean, Prompts, PyTree, Rollout, TrainState

Stage = Callable[..., Any]


def make_rollout(
    spec: NetworkSpec, options: Mapping[str, Any], *, stop_ids: tuple[int, ...], pad_id: int, opponent: Callable[[Networks], Any] | None = None,
    filters: sampling.Filters = sampling.NONE, group_size: int = 1, forked: bool = True,
) -> Stage:
    """`(params, frozen, prompts, key, iteration) -> Rollout`, one completion per row, beside the second data set's rows that came with the prompts.

    Args:
      spec: the networks' static part; its temperature divides the sampler's logits too.
      options: config.sampling.
      stop_ids, pad_id: from the tokenizer.
      opponent: the objective's; what it makes of the networks draws every second row. None: the policy draws all.
      filters: config.sampling.filters and stop_strings, composed.
      group_size: rows per prompt in the prompts to come, neighbours; 1 where they come one by one, as in a validation.
      forked: whether later passes compute a group's prompt once; the devices must divide the groups then.
    """

    def rollout(params: PyTree, frozen: PyTree, prompts: Prompts, key: Array, iteration: Array) -> Rollout:
        nets = Networks(params, frozen, spec)
        settings: dict[str, Any] = dict(
            iteration=iteration, max_new_tokens=options["max_new_tokens"], temperature=spec.temperature, top_k=options["top_k"],
            top_p=options["top_p"], stop_ids=stop_ids, pad_id=pad_id, filters=filters, group_size=group_size,
            slots=options["slots"],
        )
        if opponent is None:
            rolled = sampling.generate(nets, prompts, key, **settings)
        else:
            rolled = sampling.generate_against(nets, opponent(nets), prompts.replace(ptx=None), key, **settings)
        rolled = rolled if forked else rows.apart(rolled)
        return rolled.replace(ptx=prompts.ptx, old_logps=rolled.plain_logps if options["old_logps"] == "sampler" else None)

    return rollout


def make_score(spec: NetworkSpec, mean: float, std: float) -> Stage:
    """`(params, frozen, rollout) -> (rollout, {})` with the frozen reward model's score of each row, (score − mean) / std.

    Args:
      spec: the networks' static part.
      mean, std: of the reward model over its reference set; 0 and 1 leave the score as it is.
    """

    def score(params: PyTree, frozen: PyTree, rollout: Rollout) -> tuple[Rollout, dict[str, Mean]]:
        return rollout.replace(scores=learned.normalise(learned.score(Networks(params, frozen, spec), rollout), mean, std)), {}

    return score


def fuse(rollout: Stage, score: Stage | None, step: Stage) -> Callable[[TrainState, PyTree, Prompts], tuple[TrainState, Any, Rollout]]:
    """One iteration `(state, frozen, prompts) -> (state, metrics, rollout)`, to be jitted whole.

    Args:
      rollout: from make_rollout.
      score: `(params, frozen, rollout) -> (rollout with scores, metrics)`, pure JAX; None for an objective that reads no score.
      step: from train.step.make_step.
    """

    def iteration(state: TrainState, frozen: PyTree, prompts: Prompts) -> tuple[TrainState, Any, Rollout]:
        rolled = rollout(state.params, frozen, prompts, state.key, state.batch_index)
        found: dict[str, Mean] = {}
        if score is not None:
            rolled, found = score(state.params, frozen, rolled)
            chex.assert_equal_shape([rolled.scores, rolled.truncated])
        state, metrics = step(state, frozen, rolled)
        return state, {**metrics, **found}, rolled

    return iteration


def refreshed(step: Stage, every: int) -> Stage:
    """`step`, or a whole iteration, against a reference that the policy becomes after every so many batches: `state.online.reference`.

    Args:
      step: `(state, frozen, batch) -> (state, …)`.
      every: batches, ≥ 1.
    """

    def moved(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[Any, ...]:
        chex.assert_rank(state.batch_index, 0)
        after, *rest = step(state.replace(online=None), {**frozen, "ref": state.online.reference}, batch)
        due = after.batch_index % every == 0
        reference = jax.tree.map(lambda old, new: jnp.where(due, new, old), state.online.reference, after.params["policy"])
        return after.replace(online=state.online.replace(reference=reference)), *rest

    return moved
