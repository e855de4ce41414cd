"""Optax by config: AdamW or Muon, warm-up and schedule, clipping, decay without norms and biases, skipped non-finite steps, EMA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.errors import UserError
from rlhf_jax.types import PyTree

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "muon")


class EmaState(NamedTuple):
    """Exponential moving average of the parameters."""

    ema: PyTree


def params_ema(decay: float) -> optax.GradientTransformation:
    """Keeps ema ← decay·ema + (1 − decay)·params in the optimizer's state; updates pass unchanged. It stands last in a chain.

    Args:
      decay: in (0, 1).
    """

    def update(updates: PyTree, state: EmaState, params: PyTree | None = None) -> tuple[PyTree, EmaState]:
        new = optax.apply_updates(params, updates)
        return updates, EmaState(jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p.astype(e.dtype), state.ema, new))

    def init(params: PyTree) -> EmaState:
        # float32 whatever the parameters are: in bfloat16 an average with decay 0.999 would stand still.
        return EmaState(jax.tree.map(lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32)), params))

    return optax.GradientTransformation(init, update)


def held_back() -> optax.GradientTransformationExtraArgs:
    """Sets the updates of all networks but the critic to zero while the extra argument `held` is true.

    Moments go on: started from nothing when the policy is let go, Adam's first steps would be three times too long, the count of updates being
    everybody's. It stands before `params_ema`, which sees what is applied.
    """

    def update(updates: PyTree, state: Any, params: PyTree | None = None, *, held: Any, **_: Any) -> tuple[PyTree, Any]:
        zero = lambda tree: jax.tree.map(lambda x: jnp.where(held, jnp.zeros_like(x), x), tree)  # noqa: E731
        return {name: tree if name == "critic" else zero(tree) for name, tree in updates.items()}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def refused_if_not_finite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.apply_if_finite` that never gives in, by a selection in the place of a branch, whose results would lie beside the moments that they
    replace: twelve bytes a parameter.

    Args:
      inner: gets non-finite gradients too; what it makes of them is not taken.
    """
    wrapped, like = optax.with_extra_args_support(inner), optax.apply_if_finite(inner, 0)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        finite = jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(updates)]))
        made, kept = wrapped.update(updates, state.inner_state, params, **extra)
        counted = state._replace(
            notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1), total_notfinite=state.total_notfinite + ~finite, last_finite=finite,
            inner_state=jax.tree.map(lambda new, old: jnp.where(finite, new, old), kept, state.inner_state),
        )
        return jax.tree.map(lambda x: jnp.where(finite, x, 0), made), counted

    return optax.GradientTransformationExtraArgs(like.init, update)


def evaluation_params(params: PyTree, opt_state: PyTree) -> PyTree:
    """The parameters' moving average where there is one, else the parameters."""
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, EmaState)) if isinstance(s, EmaState)]
    return jax.tree.map(lambda e, p: e.astype(p.dtype), found[0].ema, params) if found else params


def schedule(config: Mapping[str, Any], total: int) -> Callable[[Any], Any]:
    """Learning rate at update n: linear warm-up from 0, then constant, linear or cosine down to `end_lr_ratio · lr` at `total`.

    Args:
      config: config.optimizer.
      total: updates of the whole run.
    """
    lr, warmup = config["lr"], config["warmup_steps"]
    if config["schedule"] not in SCHEDULES:
        raise UserError(f"config.optimizer.schedule = {config['schedule']!r}: must be one of {', '.join(SCHEDULES)}")
    end, length = lr * config["end_lr_ratio"], max(total - warmup, 1)
    body = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, end, length),
        "cosine": optax.cosine_decay_schedule(lr, length, alpha=config["end_lr_ratio"]),
    }[config["schedule"]]
    # The first update has a positive rate: (n + 1) / warmup.
    return optax.join_schedules([optax.linear_schedule(lr / warmup, lr, warmup - 1), body], [warmup - 1]) if warmup > 1 else body


def _leaf_name(path: Any) -> str:
    return str(getattr(path[-1], "key", path[-1]))


def decays(params: PyTree) -> PyTree:
    """True where weight decay applies: everything but norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _leaf_name(path) not in ("scale", "bias"), params)


def _muon_dimensions(params: PyTree) -> PyTree:
    """Muon for the layers' matrices (a leading axis of stacked layers is a batch axis), Adam with Nesterov momentum for all else."""

    def one(path: Any, leaf: Any) -> Any:
        in_layers = any(getattr(part, "key", None) == "layers" for part in path)
        matrix = in_layers and _leaf_name(path) == "kernel"
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if matrix else None

    return jax.tree_util.tree_map_with_path(one, params)


def build(config: Mapping[str, Any], total: int, *, critic_first: bool = False) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
    """The optimizer and its learning-rate schedule.

    Args:
      config: config.optimizer.
      total: updates of the whole run.
      critic_first: the critic trains alone for a while; updates then take the extra argument `held`.

    Returns:
      The transformation, whose state also counts non-finite updates (optax's ApplyIfFiniteState), and the schedule.
    """
    rate = schedule(config, total)
    moments = jnp.dtype(config["moment_dtype"])
    if config["name"] == "adamw":
        core = optax.adamw(
            rate, b1=config["b1"], b2=config["b2"], eps=config["eps"], mu_dtype=moments, weight_decay=config["weight_decay"], mask=decays
        )
    elif config["name"] == "muon":
        # Its own decay would reach the norms and biases of its Adam part, so decay and rate stand behind a rate of 1.
        core = optax.chain(
            optax.contrib.muon(
                1.0, beta=config["muon_beta"], eps=config["eps"], mu_dtype=moments, adam_b1=config["b1"], adam_b2=config["b2"],
                consistent_rms=0.2, muon_weight_dimension_numbers=_muon_dimensions,
            ),
            optax.add_decayed_weights(-config["weight_decay"], mask=decays),
            optax.scale_by_schedule(rate),
        )
    else:
        raise UserError(f"config.optimizer.name = {config['name']!r}: must be one of {', '.join(OPTIMIZERS)}")
    parts = [core]
    if config["clip_norm"] > 0:
        parts.insert(0, optax.clip_by_global_norm(config["clip_norm"]))
    if critic_first:
        parts.append(held_back())
    if config["ema_decay"] > 0:
        parts.append(params_ema(config["ema_decay"]))
    return refused_if_not_finite(optax.chain(*parts)), rate
