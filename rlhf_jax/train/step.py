"""The one train step: `(state, frozen, batch) -> (state, metrics)`, for every objective.

Reference log-probs → the objective's `prepare` over the global batch → epochs × minibatches of one `update`. Offline training is the case
1 × 1. An update splits its rows into strided microbatches, sums the loss terms' counts over them first (they depend on the batch only, so the
compiler drops that forward pass), then accumulates gradients of Σ total / count. So accumulation changes no loss, whatever its
normalisation. Shardings are put on from outside.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from rlhf_jax.models import Networks, NetworkSpec
from rlhf_jax.models.passes import Passes
from rlhf_jax.ops import rows
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.types import Array, Mean, Purpose, PyTree, Rollout, Sequences, TrainState, settled

Metrics = dict[str, Mean]


def fill_reference(nets: Networks, batch: PyTree) -> PyTree:
    """`batch` with `ref_logps` in every `Sequences` that lacks them, if there is a reference.

    Args:
      nets: the networks.
      batch: a `Sequences`, or a dataclass with fields that are.
    """
    if not nets.has("ref"):
        return batch

    def fill(seqs: Sequences) -> Sequences:
        return seqs if seqs.ref_logps is not None else seqs.replace(ref_logps=nets.ref(seqs).logps)

    if isinstance(batch, Sequences):
        return fill(batch)
    return batch.replace(**{name: fill(seqs) for name, seqs in _sequences(batch).items()})


def _sequences(batch: PyTree) -> dict[str, Sequences]:
    """The fields of a batch that are sequences."""
    found = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {name: value for name, value in found.items() if isinstance(value, Sequences)}


def _amounts(batch: PyTree) -> Metrics:
    """How many tokens of a batch are real, and under its loss mask, and the share of its slots that are padding."""
    parts = [batch] if isinstance(batch, Sequences) else list(_sequences(batch).values())
    if not parts:
        return {}
    slots, one = jnp.float32(sum(part.tokens.size for part in parts)), jnp.float32(1.0)
    counts = [(jnp.sum(part.segment_ids != 0), jnp.sum(loss_tokens(part))) for part in parts]
    real, trained = jnp.array(counts, jnp.float32).sum(0)
    return {"data/tokens": Mean(real, one), "data/loss_tokens": Mean(trained, one), "data/padding": Mean(slots - real, slots)}


def _sum(tree: PyTree, axis: int | tuple[int, ...]) -> PyTree:
    return jax.tree.map(lambda x: x.sum(axis), tree)


def _losses(objective: Any, nets: Networks, batch: PyTree, keys: Array) -> tuple[dict[str, Mean], Metrics]:
    """The objective's loss, and the balance loss of the experts that it asked as a term of its own, one count per sequence."""
    tally: list[Mean] = []
    terms, metrics = objective.loss(nets.replace(tally=tally), batch, keys)
    return ({**terms, "balance": functools.reduce(Mean.merge, tally)} if tally else terms), metrics


def gradients(objective: Any, nets: Networks, batch: PyTree, keys: Array, microbatches: int) -> tuple[PyTree, Metrics]:
    """Gradient of Σ_terms total / count over the whole batch, accumulated over microbatches, and the merged metrics.

    Args:
      objective: has `loss(nets, batch, keys) -> (terms, metrics)`.
      nets: `nets.params` is differentiated.
      batch: leaves leading with B.
      keys: [B] typed keys for dropout.
      microbatches: how many; divides B.

    Returns:
      Gradients like `nets.params`, float32; metrics, each loss term among them as `loss/<name>`.
    """
    chex.assert_tree_shape_prefix((batch, keys), (rows.count(batch),))

    def counts(part: PyTree) -> dict[str, Array]:
        terms, _ = _losses(objective, nets.replace(passes=None), *part)
        return {name: term.count for name, term in terms.items()}

    def loss(params: PyTree, part: PyTree, scale: dict[str, Array]) -> tuple[Array, Metrics]:
        passes = None if nets.passes is None else nets.passes.within(params)
        terms, metrics = _losses(objective, nets.replace(params=params, passes=passes), *part)
        logged = {f"loss/{name}": term for name, term in terms.items()}
        return sum((term.total * scale[name] for name, term in terms.items()), jnp.float32(0)), jax.lax.stop_gradient({**metrics, **logged})

    def accumulate(total: tuple[PyTree, Metrics], part: PyTree) -> tuple[tuple[PyTree, Metrics], None]:
        found = jax.grad(loss, has_aux=True)(nets.params, part, scale)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, found), None

    if microbatches == 1:
        scale = _scale(counts((batch, keys)))
        grads, metrics = jax.grad(loss, has_aux=True)(nets.params, (batch, keys), scale)
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), grads), _with_whole(metrics, scale)
    parts = rows.interleave((batch, keys), microbatches)
    summed = _sum(jax.lax.map(counts, parts), 0)
    scale = _scale(summed)
    shapes = jax.eval_shape(jax.grad(loss, has_aux=True), nets.params, jax.tree.map(lambda x: x[0], parts), scale)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)
    grads, metrics = jax.lax.scan(accumulate, start, parts)[0]
    return grads, _with_whole(metrics, scale)


def _scale(counts: dict[str, Array]) -> dict[str, Array]:
    return {name: 1.0 / jnp.where(count == 0, 1.0, count) for name, count in counts.items()}


def _with_whole(metrics: Metrics, scale: dict[str, Array]) -> Metrics:
    """The metrics with the sum of the terms as `loss`."""
    whole = sum(metrics[f"loss/{name}"].compute() for name in scale)
    return {**metrics, "loss": Mean(jnp.asarray(whole, jnp.float32), jnp.float32(1.0))}


def _finite_update(
    optimizer: optax.GradientTransformation, grads: PyTree, state: TrainState, filled: Array, **extra: Any
) -> tuple[PyTree, Any, Array]:
    """Updates, the optimizer's next state, and whether it failed: zeros and the old state, counted, where gradients, their norm or updates are not
    finite; zeros and the old state, not counted, where there was nothing to train on (`filled` is false).

    `optax.apply_if_finite` looks at the gradients only. A gradient whose square overflows would leave Adam's second moment infinite, and its
    parameter standing still, for ever; and clipping to a norm would turn the whole update into zeros that nobody counts."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
    finite = jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)] + [jnp.isfinite(optax.global_norm(grads))]))
    old, taken = state.opt_state, finite & filled
    counted = old._replace(notfinite_count=old.notfinite_count + filled, total_notfinite=old.total_notfinite + filled,
                           last_finite=old.last_finite & ~filled)
    updates = jax.tree.map(lambda x: jnp.where(taken, x, 0), updates)
    return updates, jax.tree.map(lambda new, old: jnp.where(taken, new, old), opt_state, counted), filled & ~finite


def make_update(
    objective: Any, spec: NetworkSpec, optimizer: optax.GradientTransformation, rate: Callable[[Array], Array], *, microbatches: int,
    critic_only: int = 0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`(state, frozen, prepared batch) -> (state, metrics)`: one step of the optimizer.

    Args:
      objective, spec, optimizer, rate, microbatches, critic_only: as in `make_step`.
    """

    def update(state: TrainState, frozen: PyTree, batch: PyTree, passes: Passes | None = None) -> tuple[TrainState, Metrics]:
        nets = Networks(state.params, frozen, spec, passes=passes)
        key = jax.random.fold_in(jax.random.fold_in(state.key, Purpose.DROPOUT), state.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows.count(batch)))
        grads, metrics = gradients(objective, nets, batch, keys, microbatches)
        extra = {"held": state.batch_index < critic_only} if critic_only else {}
        # Momentum, weight decay and the schedule would move on all the same after rows that train nothing: filler, or without a score.
        filled = jnp.array([term.count for name, term in metrics.items() if name.startswith("loss/")]).any()
        updates, opt_state, failed = _finite_update(optimizer, grads, state, filled, **extra)
        applied = state.step - state.opt_state.total_notfinite
        one = jnp.float32(1.0)
        metrics |= {
            "optimizer/grad_norm": Mean(optax.global_norm(grads), one),
            "optimizer/lr": Mean(jnp.asarray(rate(applied), jnp.float32), one),
            "optimizer/skipped": Mean(failed.astype(jnp.float32), one),
            "optimizer/empty": Mean(1.0 - filled.astype(jnp.float32), one),
        }
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + filled, params=params, opt_state=opt_state), metrics

    return update


def make_prepare(objective: Any, spec: NetworkSpec, chunks: int) -> Callable[..., tuple[PyTree, PyTree, Metrics]]:
    """`(state, frozen, batch) -> (prepared batch, carry, metrics)`: the reference's log-probs, then the objective's `prepare`.

    Args:
      objective, spec: as in `make_step`.
      chunks: microbatches × minibatches, one forward pass each.
    """

    def prepare(state: TrainState, frozen: PyTree, batch: PyTree, passes: Passes | None = None) -> tuple[PyTree, PyTree, Metrics]:
        nets = Networks(state.params, frozen, spec, row_chunks=chunks, passes=passes)
        batch = fill_reference(nets, rows.divisible(batch, chunks))
        key = jax.random.fold_in(jax.random.fold_in(state.key, Purpose.PREPARE), state.batch_index)
        found: tuple[PyTree, PyTree, Metrics] = objective.prepare(nets, batch, state.carry, key)
        return found

    return prepare


def make_step(
    objective: Any, spec: NetworkSpec, optimizer: optax.GradientTransformation, rate: Callable[[Array], Array], *, microbatches: int,
    epochs: int, minibatches: int, critic_only: int = 0,
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, Metrics]]:
    """The train step of an objective, a pure function to be jitted with its shardings (sharding.jit).

    Args:
      objective: from objectives.bind.
      spec: the networks' static part.
      optimizer, rate: from train.optimizer.build.
      microbatches: gradient accumulation within an update.
      epochs: passes over the batch.
      minibatches: updates per pass; with more than one, rows are shuffled anew in each pass, groups that share a prompt as one.
      critic_only: batches from the run's first on whose updates of all but the critic are not applied (the optimizer is built for it), nor those of
        the carry: a KL controller has nothing to control while the policy stands still.
    """
    update = make_update(objective, spec, optimizer, rate, microbatches=microbatches, critic_only=critic_only)
    prepare = make_prepare(objective, spec, microbatches * minibatches)

    def passes(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        shuffle = jax.random.fold_in(jax.random.fold_in(state.key, Purpose.SHUFFLE), state.batch_index)

        def one_pass(state: TrainState, epoch: Array) -> tuple[TrainState, Metrics]:
            order = rows.shuffled(batch, jax.random.fold_in(shuffle, epoch)) if minibatches > 1 else batch
            return jax.lax.scan(lambda s, part: update(s, frozen, part), state, rows.interleave(order, minibatches))

        state, metrics = jax.lax.scan(one_pass, state, jnp.arange(epochs))
        return state, _sum(metrics, (0, 1))

    def step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        # A batch that is one update, in one piece, is passed through its networks once.
        shared = Passes(state.params) if epochs * minibatches * microbatches == 1 else None
        age = {"rollout/staleness": Mean.of(state.batch_index - batch.version, batch.real)} if isinstance(batch, Rollout) else {}
        amounts = _amounts(batch)
        batch, carry, prepared = prepare(state, frozen, batch, shared)
        run = functools.partial(update, passes=shared) if epochs * minibatches == 1 else passes
        applied_before, old_carry = state.step - state.opt_state.total_notfinite, state.carry
        state, metrics = run(state, frozen, batch)
        # A batch that gave no update leaves no other trace either.
        counts = (state.step - state.opt_state.total_notfinite > applied_before) & (state.batch_index >= critic_only)
        finite = jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(carry)] + [counts]))
        state = state.replace(carry=jax.tree.map(lambda new, old: jnp.where(finite, new, old), carry, old_carry))
        # In a row, at the end of this batch: what stops a run (config.run.max_nonfinite).
        metrics["optimizer/nonfinite_run"] = Mean(state.opt_state.notfinite_count.astype(jnp.float32), jnp.float32(1.0))
        return state.replace(batch_index=state.batch_index + 1), {**age, **amounts, **prepared, **settled(metrics)}

    return step
