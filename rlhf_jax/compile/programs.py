"""The programs of a run: those that it runs, and the phases that they are made of, each with the shapes of its arguments.

Offline a run is one program, the step. Online it is one fused iteration, or rollout, score and step apart, as the run itself decides
(train.programs). Its phases are compiled besides, so that costs can be told apart: prefill, one decode step, scores, prepare, update.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import objectives, sharding
from rlhf_jax.models import Networks
from rlhf_jax.train.assemble import Experiment
from rlhf_jax.train.programs import Programs, for_step
from rlhf_jax.train.step import make_prepare, make_update
from rlhf_jax.types import Array, Prompts, PyTree, TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """One program, to be lowered with the shapes of its arguments."""

    name: str
    fn: Any  # jitted
    args: tuple[Any, ...]
    beside: PyTree  # shapes of what lies on the devices meanwhile and is no argument
    runs: bool  # whether the run runs it as it is; else it is a phase of one that does
    times: int = 1  # of a phase, in one batch or iteration

    def lower(self) -> Any:
        """Traced for its topology."""
        return self.fn.lower(*self.args)


def programs(exp: Experiment) -> list[Program]:
    """What a run compiles, and the phases of it.

    Args:
      exp: from compile.outline.
    """
    run = Programs(exp)
    state = run.abstract()
    first = sharding.global_shapes(exp.batch(0), exp.mesh)
    if not exp.online:
        batch = first
        return [Program("step", run.step, (state, exp.frozen, batch), (), True), *_training(exp, state, exp.frozen, batch)]
    assert run.rollouts is not None
    prompts, frozen = first, run.rollouts.frozen(state)
    handed = run.rollouts.handed_out(state)
    everything = (state, frozen)
    found = []
    if run.fused:
        found.append(Program("iteration", run.step, (state, exp.frozen, prompts), (), True))
    else:
        drawn = (state.params, frozen, prompts, state.key, state.batch_index)
        found.append(Program("rollout", run.rollouts.draw, drawn, _without(everything, drawn), True))
        found.append(Program("step", run.step, (for_step(state), exp.frozen, handed), state.online, True))
    found += _sampling(exp, state, frozen, prompts, everything)
    if run.rewards is not None and run.rewards.pure:
        score = sharding.jit(run.rewards.score, exp.mesh)
        rolled = handed.replace(scores=None, components=None)
        found.append(Program("score", score, ({}, frozen, rolled), state, not run.fused))
    found += _training(exp, for_step(state), frozen, handed)
    return found


def _without(everything: PyTree, args: PyTree) -> list[Any]:
    """The leaves of everything that are not among the arguments."""
    given = {id(leaf) for leaf in jax.tree.leaves(args)}
    return [leaf for leaf in jax.tree.leaves(everything) if id(leaf) not in given]


def _sampling(exp: Experiment, state: TrainState, frozen: PyTree, prompts: Prompts, everything: PyTree) -> list[Program]:
    """Prefill, and one step of the decode loop: the whole rollout is N − 1 of them."""
    options, mesh = exp.config["sampling"], exp.mesh
    new, group = options["max_new_tokens"], options["group_size"]
    rows, width = prompts.tokens.shape
    slots, decoded = width + new, options["slots"] or rows

    def prefill(params: PyTree, frozen: PyTree, tokens: Array, positions: Array, segment_ids: Array) -> Any:
        chex.assert_rank(tokens, 2)
        return Networks(params, frozen, exp.spec).decoding().prefill(tokens, positions, segment_ids, slots)

    def decode(params: PyTree, frozen: PyTree, token: Array, position: Array, slot: Array, visible: Array, cache: PyTree) -> Any:
        chex.assert_rank(token, 1)
        return Networks(params, frozen, exp.spec).decoding().decode(token, position, slot, visible, cache)

    where = sharding.row_sharding(mesh)
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype, sharding=where)  # noqa: E731
    once: tuple[Any, ...] = tuple(shape(jnp.int32, rows // group, width) for _ in range(3))
    if (rows // group) % sharding.row_devices(mesh):  # prompts come as rows, of which each group's first is read
        once = (prompts.tokens, prompts.positions, prompts.segment_ids)
    policy = {"policy": state.params["policy"]}
    given: tuple[Any, ...] = (policy, frozen, *once)
    first = Program("prefill", sharding.jit(prefill, mesh), given, _without(everything, given), False)
    full = tuple(shape(jnp.int32, decoded, width) for _ in range(3))
    _, cache = sharding.jit(prefill, mesh).eval_shape(policy, frozen, *full)
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_cache_sharding(mesh, x.shape)), cache)
    token, at = shape(jnp.int32, decoded), sharding.placed(jax.ShapeDtypeStruct((), jnp.int32), sharding.replicated(mesh))
    given = (policy, frozen, token, token, at, shape(jnp.bool_, decoded, slots), cache)
    step = sharding.jit(decode, mesh, donate=(6,))
    return [first, Program("decode", step, given, _without(everything, given), False, (new - 1) * -(-rows // decoded))]


def _cache_sharding(mesh: Any, shape: tuple[int, ...]) -> Any:
    """Of a cache leaf […, B, G, ·, ·]: rows, and heads where they divide, as models/cache.py pins it."""
    rules, heads = sharding.rules(mesh), len(shape) - 3
    whole = shape[heads] % math.prod(mesh.shape[axis] for axis in [rules["kv_heads"]] if axis)
    names = (*(None,) * (heads - 1), "batch", None if whole else "kv_heads", None, None)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(None if name is None else rules[name] for name in names)))


def _training(exp: Experiment, state: TrainState, frozen: PyTree, batch: PyTree) -> list[Program]:
    """What the step is made of: prepare over the batch, and epochs × minibatches updates of one part of it."""
    run, mesh = exp.config["run"], exp.mesh
    chunks = run["microbatches"] * run["minibatches"]
    prepare = sharding.jit(make_prepare(exp.objective, exp.spec, chunks), mesh)
    found = [Program("prepare", prepare, (state, frozen, batch), (), False)]
    prepared, _, _ = prepare.eval_shape(state, frozen, batch)
    where = sharding.row_sharding(mesh)
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // run["minibatches"], *x.shape[1:]), x.dtype, sharding=where), prepared)
    update = functools.partial(make_update(exp.objective, exp.spec, exp.optimizer, exp.rate, microbatches=run["microbatches"]), passes=None)
    jitted = sharding.jit(update, mesh, donate=(0,), out_shardings=(exp.start.shardings.replace(online=_shardings(state.online)), None))
    found.append(Program("update", jitted, (state, frozen, part), (), False, run["epochs"] * run["minibatches"]))
    # Offline, without a reference and without a `prepare` of its own, an objective has nothing to prepare.
    own = "prepare" in vars(objectives.load(exp.objective.name))
    return found if exp.online or own or "ref" in exp.frozen else found[1:]


def _shardings(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.sharding, tree)
