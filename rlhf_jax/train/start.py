"""The first state of a run and the frozen leaves beside it: drawn, or read tensor by tensor from a checkpoint straight onto their shards.

Full, frozen-layer and adapter training are one mechanism: a pattern splits each network's tree before `grad` into `state.params` and
`frozen["base"]`, which `nets` merges. What a checkpoint lacks (a new head, an adapter) is drawn; what only training reads is read only by training:
a resumed run loads the frozen leaves alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, Networks, NetworkSpec, layout, lora, quantise, transformer
from rlhf_jax.models.adopt import DRAWN, adopt
from rlhf_jax.models.networks import merge
from rlhf_jax.objectives import Objective
from rlhf_jax.types import Purpose, PyTree, TrainState

NEW_HEADS = r"/(score_head|value_head)/"  # what an adapter run trains besides its adapters
TABLES = r"/ends/(embedding|lm_head)$"  # and besides, where tokens are added


def split(params: PyTree, trains: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """(trained, frozen) partial trees of nested dicts.

    Args:
      params: nested dicts.
      trains: whether the leaf of this "/"-joined path trains.
    """

    def divide(tree: PyTree, path: str) -> tuple[PyTree, PyTree]:
        if not isinstance(tree, dict):
            return (tree, None) if trains(path) else (None, tree)
        parts = {key: divide(value, f"{path}/{key}" if path else key) for key, value in tree.items()}
        sides = ({key: part[i] for key, part in parts.items() if part[i] is not None} for i in (0, 1))
        trained, frozen = (side or None for side in sides)
        return trained, frozen

    trained, frozen = divide(params, "")
    return trained or {}, frozen or {}


def beside_a_base(params: PyTree, frozen: PyTree) -> PyTree:
    """What a checkpoint holds of networks whose base it does not repeat: all that trains, and adapters and heads that config.trainable froze as they
    were drawn, which no other checkpoint has.

    Args:
      params: of the state.
      frozen: the untrained leaves beside it, of the same networks.
    """
    return merge(params, split(frozen, lambda path: re.search(f"{lora.TRAINABLE}|{NEW_HEADS}", path) is not None)[0])


def trains(pattern: str, adapters: bool, grown: bool = False) -> Callable[[str], bool]:
    """Which leaves train: those whose path `pattern` matches somewhere, and of these, with adapters, only adapters, new heads, and tables of tokens
    that have new ones, which would stay alike for ever.

    Args:
      pattern: config.trainable.
      adapters: whether config.lora is on.
      grown: whether config.model.add_tokens is.
    """

    def decides(path: str) -> bool:
        chosen = not adapters or re.search(lora.TRAINABLE, path) or re.search(NEW_HEADS, path) or (grown and re.search(TABLES, path))
        return bool(chosen) and re.search(pattern, path) is not None

    return decides


def _state_shardings(mesh: Mesh, abstract: TrainState, params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Optimizer state follows its parameter, and a carry that holds parameters of its own follows those it is shaped like; everything else is
    whole on every device."""
    whole = sharding.replicated(mesh)
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731  Muon keeps no second moment of a matrix, Adam none of Muon's
    opt_state = optax.tree_map_params(
        optimizer, lambda x, s: x if masked(x) else s, abstract.opt_state, params, transform_non_params=lambda _: whole, is_leaf=masked
    )
    shapes = {name: jax.tree.map(jnp.shape, tree) for name, tree in abstract.params.items()}
    alike = lambda x: next((params[name] for name in shapes if jax.tree.map(jnp.shape, x) == shapes[name]), None)  # noqa: E731
    carry = jax.tree.map(lambda x: alike(x) or whole, abstract.carry, is_leaf=lambda x: alike(x) is not None)
    rest = jax.tree.map(lambda _: whole, abstract.replace(params=None, opt_state=None, carry=None))
    return rest.replace(params=params, opt_state=opt_state, carry=carry)


class Start:
    """The trained networks' first leaves, and the first state made of them.

    Args:
      config: checked.
      objective: bound.
      spec: the networks' static part.
      tx: the optimizer.
      configs: the trained networks' configurations by name.
      loaded: canonical parameters, read or not, of those that start from a checkpoint.
      mesh: where.
      frozen: networks that never train, on their shardings.
      real: False: `frozen` gives shapes, and there is no first state.

    Raises:
      UserError: nothing would train, or a checkpoint does not fit.
    """

    def __init__(self, config: Mapping[str, Any], objective: Objective, spec: NetworkSpec, tx: optax.GradientTransformation,
                 configs: Mapping[str, ModelConfig], loaded: Mapping[str, PyTree], mesh: Mesh, frozen: Mapping[str, PyTree], *,
                 real: bool = True) -> None:
        self._real, self.mesh, self._config, self._configs, adapters = real, mesh, config, configs, config["lora"]["rank"] > 0
        shapes = jax.eval_shape(functools.partial(self._draw, configs))
        leaves = {
            name: layout.to_runtime(adopt(layout.to_canonical(tree), loaded[name], configs[name]), configs[name].unit) if name in loaded
            else jax.tree.map(lambda _: DRAWN, tree)
            for name, tree in shapes.items()
        }
        self._refuse_drawn_codes(leaves)
        decide = trains(config["trainable"], adapters, bool(config["model"]["add_tokens"]))
        axes = {name: transformer.logical_axes(network) for name, network in configs.items()}
        where = sharding.parameter_shardings(mesh, axes, shapes)
        base_dtype = {"same": None, "bfloat16": jnp.bfloat16}.get(config["lora"]["base"]) if adapters else None
        split_all = lambda trees: split(trees, decide)  # noqa: E731
        (self._trained, base), (self._trained_leaves, self._base_leaves) = (split_all(trees) for trees in (shapes, leaves))
        self._trained_at, self._base_at = split_all(where)
        self._base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, base_dtype if base_dtype and _is_float(x) else x.dtype), base)
        if not self._trained:
            raise UserError(f"config.trainable = {config['trainable']!r} matches no parameter: nothing would train")
        self._shares = adapters and not _holds(leaves.get("policy", {}), lora.LEAVES)
        self._frozen = dict(frozen)

        def first(trained: PyTree, frozen: Mapping[str, PyTree]) -> TrainState:
            carry = objective.init_carry(Networks(trained, frozen, spec))
            return TrainState(
                step=jnp.zeros((), jnp.int32), batch_index=jnp.zeros((), jnp.int32), params=trained, opt_state=tx.init(trained),
                key=jax.random.key(config["seed"]), carry=carry,
            )

        self._first = first
        abstract_frozen = {**self._frozen, **({"base": self._base} if self._base else {})}
        state = jax.eval_shape(first, self._trained, abstract_frozen)
        self.shardings = _state_shardings(mesh, state, self._trained_at, tx)
        self.abstract: TrainState = jax.tree.map(sharding.placed, state, self.shardings)

    def _draw(self, configs: Mapping[str, ModelConfig]) -> PyTree:
        """Fresh parameters of every trained network, in the running layout."""
        key = jax.random.fold_in(jax.random.key(self._config["seed"]), Purpose.INIT)
        return {name: transformer.init(network, jax.random.fold_in(key, number)) for number, (name, network) in enumerate(configs.items())}

    def _refuse_drawn_codes(self, leaves: PyTree) -> None:
        if any(leaf is DRAWN and path[-1].key == quantise.CODES for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)):
            raise UserError(f"config.lora.base = {self._config['lora']['base']!r} quantises a checkpoint's kernels, and config.init_from names none: "
                            "name one, or set base = 'same'")

    def _made(self, leaves: PyTree, shapes: PyTree, where: PyTree) -> PyTree:
        """The leaves on their shardings: read from the checkpoint, or drawn."""
        if not self._real:
            return jax.tree.map(sharding.placed, shapes, where)
        found, treedef = jax.tree_util.tree_flatten_with_path(leaves)
        wanted = list(zip(found, jax.tree.leaves(shapes), jax.tree.leaves(where), strict=True))
        missing = [(path, shape, at) for (path, leaf), shape, at in wanted if leaf is DRAWN]

        def draw() -> list[Any]:
            tree = self._draw(self._configs)
            return [functools.reduce(lambda node, entry: node[entry.key], path, tree).astype(shape.dtype) for path, shape, _ in missing]

        drawn = iter(sharding.jit(draw, self.mesh, out_shardings=[at for _, _, at in missing])() if missing else [])
        made = [next(drawn) if leaf is DRAWN else sharding.place(leaf, at, shape.dtype) for (_, leaf), shape, at in wanted]
        return jax.tree.unflatten(treedef, made)

    def _referred(self, tree: PyTree) -> PyTree:
        """The trained leaves that a reference at the start needs: the policy's, without fresh adapters, which change nothing yet, and its heads."""
        policy = {"policy": tree.get("policy", {})}
        return split(policy, lambda path: re.search(f"{lora.TRAINABLE}|{NEW_HEADS}", path) is None)[0] if self._shares else policy

    def state(self) -> TrainState:
        """A new first state; every call gives the same one. `frozen` comes first."""
        trained = self._made(self._trained_leaves, self._trained, self._trained_at)
        return sharding.jit(self._first, self.mesh, out_shardings=self.shardings, donate=(0,))(trained, self._frozen)

    def frozen(self, reference_is_start: bool) -> PyTree:
        """The untrained leaves, and the reference's own copy of those that train; the others it shares with the base."""
        trees: dict[str, PyTree] = {}
        if self._base:
            trees["base"] = self._made(self._base_leaves, self._base, self._base_at)
        if reference_is_start:
            own = (self._referred(tree) for tree in (self._trained_leaves, self._trained, self._trained_at))
            trees["ref"] = self._made(*own).get("policy", {})
        self._frozen |= trees
        return trees


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _holds(tree: PyTree, names: tuple[str, ...]) -> bool:
    """Whether a leaf of one of these names comes from a checkpoint (a magnitude that was made from its kernel does not)."""
    found = [path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if leaf is not DRAWN]
    return any(name in names and name != "magnitude" for name in found)
