"""From a checked config to everything a run needs: tokenizer, data, networks, optimizer, shardings and the first state.

Order matters: what can be refused by reading JSON (checkpoints' metas, tokenizers, data files) is read before devices are touched, and
the programs are traced last. Full, frozen-layer and adapter training are one mechanism: `trainable` splits the network's tree before `grad`
into `state.params` and `frozen["base"]`, which `nets` merges.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rlhf_jax import data, distributed, sharding
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, Networks, NetworkSpec, layout, transformer
from rlhf_jax.models.networks import merge
from rlhf_jax.objectives import Objective
from rlhf_jax.saved import Source, chat_template, load_source
from rlhf_jax.train import optimizer as optimizers
from rlhf_jax.train.config import trained_rows
from rlhf_jax.types import Purpose, PyTree, TrainState

HEADS = ("lm_head", "score_head", "value_head")
RUNTIME = ("context", "dropout", "param_dtype", "compute_dtype", "scan_layers", "remat", "logits_chunk")


@dataclasses.dataclass
class Experiment:
    """Everything that stays fixed while a run trains, and how to make its first state."""

    config: Mapping[str, Any]
    objective: Objective
    spec: NetworkSpec
    tokenizer: Tokenizer
    template: ChatTemplate
    mesh: Mesh
    optimizer: optax.GradientTransformation
    rate: Callable[[Any], Any]
    steps: int  # batches of the whole run
    train_data: Any
    valid_data: Any  # None without a validation file
    ptx_data: Any  # config.ptx, whose rows go with the prompts; None without the section
    frozen: PyTree
    start: Start
    reward: Source | None  # the learned reward, for prompts

    @property
    def online(self) -> bool:
        return self.config["data"]["kind"] == "prompt"

    @property
    def scored(self) -> bool:
        """Whether completions get a score; an objective that needs none may not be given one (train.config)."""
        return self.online and bool(self.config["reward_from"] or self.config["reward_fn"])

    def batch(self, index: int) -> PyTree:
        """This host's rows of training batch `index`, those of the second data set among them: a function of (config.seed, index) alone."""
        batch = self.train_data.batch(index, seed=self.config["seed"])
        return batch if self.ptx_data is None else batch.replace(ptx=self.ptx_data.batch(index, seed=self.config["seed"]))


def _tokenizer(config: Mapping[str, Any], init: Source | None) -> Tokenizer:
    """The run's tokenizer; one that differs from the initial checkpoint's is refused."""
    section = config["tokenizer"]
    if section["kind"] == "inherit":
        assert init is not None
        return init.tokenizer
    if section["kind"] == "byte":
        tokenizer = Tokenizer.byte_level()
    elif section["kind"] == "file":
        tokenizer = Tokenizer.load(section["path"], pad=section["pad"], bos=section["bos"], end=section["end"])
    else:
        tokenizer = data.train_tokenizer(config["data"]["kind"], config["data"]["train"], section["vocab_size"])
    if init is not None and init.tokenizer.digest != tokenizer.digest:
        raise UserError(f"config.tokenizer.kind = {section['kind']!r} is not the tokenizer that config.init_from = {init.path!r} was trained "
                        "with: use kind = 'inherit'")
    return tokenizer


def _architecture(config: Mapping[str, Any], tokenizer: Tokenizer, init: Source | None) -> ModelConfig:
    """The trained network's configuration, checked against the tokenizer and the initial checkpoint."""
    shared_value = config["data"]["kind"] == "prompt" and config["critic"]["kind"] == "shared"
    outputs = ("score",) if config["network"] == "reward" else ("lm", "value") if shared_value else ("lm",)
    model = ModelConfig.create(config["model"], outputs)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"config.model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} tokens")
    if init is not None:
        _same_model(model, init, "config.init_from")
    return model


def _policy(source: Source, key: str) -> Source:
    """The source if it can write text; a reward model has no vocabulary head, and one drawn at random would say nothing."""
    if source.network == "reward":
        raise UserError(f"{key} = {source.path!r} is a reward model's checkpoint, which cannot generate: name a policy's run")
    return source


def _same_model(model: ModelConfig, source: Source, key: str) -> None:
    if different := model.difference(source.config):
        said = ", ".join(f"{name} {getattr(source.config, name)} (config.model has {getattr(model, name)})" for name in different)
        raise UserError(f"{key} = {source.path!r} is a checkpoint of another model: {said}")


def _like(source: ModelConfig, model: ModelConfig, outputs: tuple[str, ...]) -> ModelConfig:
    """`source`'s shapes with this run's precision and layout."""
    runtime = {name: getattr(model, name) for name in RUNTIME if name != "context"}
    return dataclasses.replace(source, **runtime, outputs=outputs)


def adopt(fresh: PyTree, loaded: PyTree) -> PyTree:
    """`loaded`'s trunk with the heads that `fresh` has: a head both have is loaded, one that only `fresh` has stays as drawn, and a critic's
    value head starts from a reward model's score head. Both in the canonical layout.

    Args:
      fresh: newly drawn parameters.
      loaded: a checkpoint's parameters of the same trunk.
    """
    ends = {name: value for name, value in loaded["ends"].items() if name not in HEADS}
    for head in HEADS:
        if head in fresh["ends"]:
            ends[head] = loaded["ends"].get(head, fresh["ends"][head])
    if "value_head" in fresh["ends"] and "value_head" not in loaded["ends"] and "score_head" in loaded["ends"]:
        ends["value_head"] = loaded["ends"]["score_head"]
    tree = {"ends": ends, "layers": loaded["layers"]}
    return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), tree, fresh)


def split(params: PyTree, pattern: str) -> tuple[PyTree, PyTree]:
    """(trained, frozen) partial trees of nested dicts, by a regular expression over "/"-joined paths.

    Args:
      params: nested dicts.
      pattern: a path that it matches somewhere trains.
    """

    def divide(tree: PyTree, path: str) -> tuple[PyTree, PyTree]:
        if not isinstance(tree, dict):
            return (tree, None) if re.search(pattern, path) else (None, tree)
        parts = {key: divide(value, f"{path}/{key}" if path else key) for key, value in tree.items()}
        sides = ({key: part[i] for key, part in parts.items() if part[i] is not None} for i in (0, 1))
        trained, frozen = (side or None for side in sides)
        return trained, frozen

    trained, frozen = divide(params, "")
    return trained or {}, frozen or {}


def _trained_networks(config: Mapping[str, Any], model: ModelConfig, init: Source | None, critic: Source | None
                      ) -> tuple[dict[str, ModelConfig], dict[str, PyTree]]:
    """The trained networks' configurations by name, and the loaded parameters of those that start from a checkpoint."""
    configs, sources = {config["network"]: model}, {config["network"]: init}
    if config["data"]["kind"] == "prompt" and config["critic"]["kind"] == "separate":
        configs["critic"] = _like(critic.config if critic else model, model, ("value",))
        sources["critic"] = critic
    return configs, {name: source.params for name, source in sources.items() if source}


def _draw(configs: Mapping[str, ModelConfig], key: jax.Array, loaded: Mapping[str, PyTree]) -> PyTree:
    """Parameters of every trained network, fresh or adopted from `loaded`, in the running layout."""
    trees = {}
    for number, (name, network) in enumerate(configs.items()):
        fresh = layout.to_canonical(transformer.init(network, jax.random.fold_in(key, number)))
        tree = adopt(fresh, loaded[name]) if name in loaded else fresh
        trees[name] = layout.to_runtime(tree, network.scan_layers)
    return trees


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


def _frozen_networks(config: Mapping[str, Any], model: ModelConfig, reward: Source | None, reference: Source | None, mesh: Mesh
                     ) -> tuple[PyTree, dict[str, ModelConfig]]:
    """Networks that come whole from a checkpoint: {"reward": …, "ref": …} on their shardings, and their configurations."""
    trees: dict[str, PyTree] = {}
    configs: dict[str, ModelConfig] = {}
    for name, source, outputs in (("reward", reward, ("score",)), ("ref", reference, ("lm",))):
        if source is None:
            continue
        configs[name] = _like(source.config, model, outputs)
        fresh = jax.eval_shape(functools.partial(transformer.init, configs[name]), jax.random.key(0))
        where = sharding.parameter_shardings(mesh, transformer.logical_axes(configs[name]), fresh)
        heads = {"ends": {k: v for k, v in source.params["ends"].items() if k not in HEADS or k in fresh["ends"]}}
        tree = layout.to_runtime({**source.params, **heads}, configs[name].scan_layers)
        trees[name] = jax.tree.map(lambda x, old, s: jax.device_put(np.asarray(x, old.dtype), s), tree, fresh, where)
    return trees, configs


def assemble(config: Mapping[str, Any], objective: Objective) -> Experiment:
    """Opens and builds everything; nothing is written but prepared data.

    Args:
      config: checked (train.config.check).
      objective: bound.

    Raises:
      UserError: a file, checkpoint, tokenizer or mesh that does not fit.
    """
    distributed.initialize(config["mesh"]["multihost"])  # before anything asks JAX for its devices
    online = config["data"]["kind"] == "prompt"
    init = load_source(config["init_from"], "config.init_from") if config["init_from"] else None
    if init is not None and config["network"] == "policy":
        _policy(init, "config.init_from")
    tokenizer = _tokenizer(config, init)
    template = chat_template(config["data"]["template"], tokenizer)
    model = _architecture(config, tokenizer, init)
    reference = None
    if config["reference_from"] not in ("", "init"):
        reference = _policy(load_source(config["reference_from"], "config.reference_from"), "config.reference_from")
        if reference.tokenizer.digest != tokenizer.digest:
            raise UserError(f"config.reference_from = {reference.path!r} reads another tokenizer than this run's")
    reward = load_source(config["reward_from"], "config.reward_from") if online and config["reward_from"] else None
    if reward is not None and reward.network != "reward":
        raise UserError(f"config.reward_from = {reward.path!r} is a {reward.network} checkpoint: name a reward model's run")
    if reward is not None and reward.tokenizer.digest == tokenizer.digest:
        longest = config["data"]["prompt_length"] + config["sampling"]["max_new_tokens"]
        if longest > reward.config.context:
            raise UserError(f"config.data.prompt_length + config.sampling.max_new_tokens = {longest} exceeds the context of {reward.config.context} "
                            f"that config.reward_from = {reward.path!r} was trained with")
    critic = None
    if online and config["critic"]["kind"] == "separate" and config["critic"]["init_from"] not in ("", "policy"):
        critic = load_source(config["critic"]["init_from"], "config.critic.init_from")
        if critic.tokenizer.digest != tokenizer.digest:
            raise UserError(f"config.critic.init_from = {critic.path!r} reads another tokenizer than the policy: choose 'policy' or ''")
    elif online and config["critic"]["init_from"] == "policy":
        critic = init

    train_data, valid_data, ptx_data = _datasets(config, tokenizer)
    steps = config["run"]["steps"] or train_data.batches_for(config["run"]["data_epochs"], config["seed"])

    mesh = distributed.make_mesh({axis: config["mesh"][axis] for axis in distributed.AXES}, config["mesh"]["devices"])
    per_pass = trained_rows(config, objective) // (config["run"]["minibatches"] * config["run"]["microbatches"])
    if per_pass % sharding.row_devices(mesh):
        raise UserError(f"config.run.batch_size = {config['run']['batch_size']} gives {per_pass} rows a microbatch, which the "
                        f"{sharding.row_devices(mesh)} devices of config.mesh.data × fsdp do not divide")

    configs, loaded = _trained_networks(config, model, init, critic)
    frozen, frozen_configs = _frozen_networks(config, model, reward, reference, mesh)
    spec = NetworkSpec(**configs, **frozen_configs, temperature=config["sampling"]["temperature"] if online else 1.0)
    tx, rate = optimizers.build(config["optimizer"], steps * config["run"]["epochs"] * config["run"]["minibatches"])
    start = Start(config, objective, spec, tx, configs, loaded, mesh, frozen)
    frozen |= start.frozen(reference_is_start=config["reference_from"] == "init")
    return Experiment(
        config=config, objective=objective, spec=spec, tokenizer=tokenizer, template=template, mesh=mesh, optimizer=tx, rate=rate, steps=steps,
        train_data=train_data, valid_data=valid_data, ptx_data=ptx_data, frozen=frozen, start=start, reward=reward,
    )


class Start:
    """The first state and the frozen leaves beside it, each made in one jit with its shardings."""

    def __init__(self, config: Mapping[str, Any], objective: Objective, spec: NetworkSpec, tx: optax.GradientTransformation,
                 configs: Mapping[str, ModelConfig], loaded: Mapping[str, PyTree], mesh: Mesh, frozen: Mapping[str, PyTree]) -> None:
        self.mesh, self.loaded, self._frozen, pattern = mesh, loaded, dict(frozen), config["trainable"]

        def draw(loaded: Mapping[str, PyTree]) -> tuple[PyTree, PyTree]:
            return split(_draw(configs, jax.random.fold_in(jax.random.key(config["seed"]), Purpose.INIT), loaded), pattern)

        def first(loaded: Mapping[str, PyTree], frozen: Mapping[str, PyTree]) -> TrainState:
            trained, base = draw(loaded)
            carry = objective.init_carry(Networks(trained, {**frozen, "base": base}, spec))
            return TrainState(
                step=jnp.zeros((), jnp.int32), batch_index=jnp.zeros((), jnp.int32), params=trained, opt_state=tx.init(trained),
                key=jax.random.key(config["seed"]), carry=carry,
            )

        shapes = jax.eval_shape(functools.partial(_draw, configs), jax.random.key(0), loaded)
        axes = {name: transformer.logical_axes(network) for name, network in configs.items()}
        self._trained, self._base = split(sharding.parameter_shardings(mesh, axes, shapes), pattern)
        if not self._trained:
            raise UserError(f"config.trainable = {pattern!r} matches no parameter: nothing would train")
        self._draw, self._first = draw, first
        shapes = jax.eval_shape(first, loaded, self._frozen)
        self.shardings = _state_shardings(mesh, shapes, self._trained, tx)
        self.abstract: TrainState = jax.tree.map(sharding.placed, shapes, self.shardings)

    def state(self) -> TrainState:
        """A new first state; every call gives the same one."""
        return sharding.jit(self._first, self.mesh, out_shardings=self.shardings)(self.loaded, self._frozen)

    def frozen(self, reference_is_start: bool) -> PyTree:
        """The untrained leaves, and the reference's own copy of those that train (the others it shares with the base)."""
        trees: dict[str, PyTree] = {}
        if self._base:
            trees["base"] = sharding.jit(lambda loaded: self._draw(loaded)[1], self.mesh, out_shardings=self._base)(self.loaded)
        if reference_is_start:
            where = self._trained.get("policy", {})
            trees["ref"] = sharding.jit(lambda loaded: self._draw(loaded)[0].get("policy", {}), self.mesh, out_shardings=where)(self.loaded)
        return trees


def _datasets(config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[Any, Any, Any]:
    """The training set, the validation set (None without a file) and the second training set (None without config.ptx)."""
    section, second = config["data"], config.get("ptx")
    shared: dict[str, Any] = dict(
        tokenizer=tokenizer, template=section["template"], cache=section["cache"] or data.default_cache(), host=distributed.host(),
        batch_size=config["run"]["batch_size"],
    )
    open_one = functools.partial(
        data.open_dataset, section["kind"], max_length=section["max_length"], prompt_length=section["prompt_length"],
        overlong=section["overlong"], **shared,
    )
    group = config["sampling"]["group_size"] if section["kind"] == "prompt" else 1
    train = open_one(path=section["train"], pack=section["pack"], group_size=group)
    valid = open_one(path=section["valid"], pack=False, group_size=1) if section["valid"] else None
    ptx = None
    if second is not None:
        ptx = data.open_dataset(second["kind"], second["train"], max_length=second["max_length"], pack=second["pack"],
                                overlong=second["overlong"], **shared)
    return train, valid, ptx


def full_params(params: PyTree, frozen: PyTree) -> PyTree:
    """Every trained network whole: trained leaves merged with the frozen base, in the canonical layout. What a checkpoint's `params` holds."""
    return layout.to_canonical(merge(params, frozen.get("base")))
