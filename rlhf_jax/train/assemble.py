"""From a checked config to everything a run needs: tokenizer, data, networks, optimizer, shardings and the first state.

Order matters: what can be refused by reading JSON (checkpoints' metas, tokenizers, data files) is read before devices are touched, and
the programs are traced last. train/start.py makes the first state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax
from absl import logging
from jax.sharding import Mesh

from rlhf_jax import data, distributed, sharding
from rlhf_jax.data import hf_tokenizer, references
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, NetworkSpec, layout
from rlhf_jax.models.config import RUNTIME, Lora
from rlhf_jax.models.networks import merge
from rlhf_jax.objectives import Objective
from rlhf_jax.saved import PROVENANCE, Source, chat_template, load_source, place
from rlhf_jax.train import optimizer as optimizers
from rlhf_jax.train import reward_networks, schedule
from rlhf_jax.train.config import INHERIT, check_lengths, fresh_model, trained_rows
from rlhf_jax.train.start import Start
from rlhf_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Site:
    """What a run is assembled of. The default opens files and places arrays on the devices here; compile.outline has shapes alone."""

    source: Callable[..., Source] = load_source
    place: Callable[[PyTree, ModelConfig, Mesh], PyTree] = place
    datasets: Callable[..., tuple[Any, Any, Any]] | None = None  # None: `datasets`
    mesh: Mesh | None = None  # None: config.mesh over the devices here
    real: bool = True  # the networks are arrays, not their shapes


HERE = Site()


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
    reward: Source | None  # config.reward_from
    rewards: Mapping[str, Mapping[str, reward_networks.RewardNetwork]]  # networks among config.rewards, by label and role
    base: str | None  # the checkpoint that adapters lie on, which theirs do not repeat; None: checkpoints hold whole networks
    provenance: Mapping[str, Any]  # what checkpoints keep of the initial one's meta: its fingerprint, and what the way back to Hugging Face needs

    @property
    def online(self) -> bool:
        return self.config["data"]["kind"] == "prompt"

    @property
    def scored(self) -> bool:
        """Whether completions get a score; an objective that needs none may not be given one (train.config)."""
        return self.online and bool(self.config["reward_from"] or self.config["reward_fn"] or self.config["rewards"] or self.environment)

    @property
    def environment(self) -> str:
        """The name of what answers the policy between its turns; empty where a prompt gets one response."""
        return self.config["env"]["name"] if self.online else ""

    def batch(self, index: int) -> PyTree:
        """This host's rows of training batch `index`, those of the second data set among them: a function of (config.seed, index) alone."""
        batch = self.train_data.batch(index, seed=self.config["seed"])
        return batch if self.ptx_data is None else batch.replace(ptx=self.ptx_data.batch(index, seed=self.config["seed"]))


def _tokenizer(config: Mapping[str, Any], init: Source | None) -> Tokenizer:
    """The run's tokenizer; one that differs from the initial checkpoint's is refused."""
    section = config["tokenizer"]
    if section["kind"] == "inherit":
        assert init is not None
        return init.reader("config.init_from")
    if section["kind"] == "byte":
        tokenizer = Tokenizer.byte_level()
    elif section["kind"] == "file":
        tokenizer = Tokenizer.load(section["path"], pad=section["pad"], bos=section["bos"], end=section["end"])
    else:
        tokenizer = data.train_tokenizer(config["data"]["kind"], config["data"]["train"], section["vocab_size"])
    if init is not None and init.tokenizer is not None and init.tokenizer.digest != tokenizer.digest:
        raise UserError(f"config.tokenizer.kind = {section['kind']!r} is not the tokenizer that config.init_from = {init.path!r} was trained "
                        "with: use kind = 'inherit'")
    return tokenizer


def _provenance(init: Source | None) -> dict[str, Any]:
    if init is None:
        return {}
    return {"init_fingerprint": init.meta.get("fingerprint"), **{name: init.meta[name] for name in PROVENANCE if name in init.meta}}


def _template(name: str, tokenizer: Tokenizer, init: Source | None) -> ChatTemplate:
    """The run's chat template; "inherit" is the initial checkpoint's."""
    if name != INHERIT:
        return chat_template(name, tokenizer)
    if init is None or init.template is None:
        raise UserError(f"config.data.template = 'inherit', but config.init_from = {init.path if init else ''!r} has none: name a shipped template, "
                        "or a file")
    return init.template


def _architecture(config: Mapping[str, Any], tokenizer: Tokenizer, init: Source | None) -> ModelConfig:
    """The trained network's configuration, checked against the tokenizer and the initial checkpoint."""
    shared_value = config["data"]["kind"] == "prompt" and config["critic"]["kind"] == "shared"
    outputs = ("score",) if config["network"] == "reward" else ("lm", "value") if shared_value else ("lm",)
    model = fresh_model(config["model"], outputs) if config["model"]["family"] != INHERIT else _inherited(config, outputs, init)
    model = _with_adapters(model, config["lora"])
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"config.model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} tokens")
    if init is not None:
        _same_model(model, init, "config.init_from")
        if 0 < init.meta.get("longest", 0) < model.context:
            logging.warning("config.model.context = %d: %s was made for %d tokens", model.context, init.path, init.meta["longest"])
    return model


def _inherited(config: Mapping[str, Any], outputs: tuple[str, ...], init: Source | None) -> ModelConfig:
    """The initial checkpoint's architecture with this run's own choices; the sizes that the config writes are those of a fresh model."""
    assert init is not None
    chosen = {name: config["model"][name] for name in RUNTIME}
    return dataclasses.replace(init.config, **chosen, outputs=outputs, lora=None, quantise="none")


def _with_adapters(model: ModelConfig, section: Mapping[str, Any]) -> ModelConfig:
    if not section["rank"]:
        return model
    if model.experts:
        logging.warning("config.lora: the experts of this network are neither adapted nor quantised, and stay frozen as they are")
    settings = {name: section[name] for name in ("rank", "alpha", "targets", "dropout", "rslora", "dora")}
    quantised = section["base"] if section["base"] in ("int8", "nf4") else "none"
    return dataclasses.replace(model, lora=Lora(**settings), quantise=quantised)


def _policy(source: Source, key: str) -> Source:
    """The source if it can write text; a reward model has no vocabulary head, and one drawn at random would say nothing."""
    if source.network == "reward":
        raise UserError(f"{key} = {source.path!r} is a reward model's checkpoint, which cannot generate: name a policy's run")
    return source


def _same_model(model: ModelConfig, source: Source, key: str) -> None:
    if different := model.difference(source.config):
        said = ", ".join(f"{name} {getattr(source.config, name)} (config.model has {getattr(model, name)})" for name in different)
        raise UserError(f"{key} = {source.path!r} is a checkpoint of another model: {said}; set config.model.family = 'inherit' to take its "
                        "architecture from it")


def _like(source: ModelConfig, model: ModelConfig, outputs: tuple[str, ...]) -> ModelConfig:
    """`source`'s shapes with this run's precision and layout."""
    runtime = {name: getattr(model, name) for name in RUNTIME if name not in ("context", "dropout")}
    return dataclasses.replace(source, **runtime, outputs=outputs)


def _trained_networks(config: Mapping[str, Any], model: ModelConfig, init: Source | None, critic: Source | None
                      ) -> tuple[dict[str, ModelConfig], dict[str, PyTree]]:
    """The trained networks' configurations by name, and the loaded parameters of those that start from a checkpoint."""
    configs, sources = {config["network"]: model}, {config["network"]: init}
    if config["data"]["kind"] == "prompt" and config["critic"]["kind"] == "separate":
        own = _like(critic.config if critic else model, model, ("value",))
        configs["critic"] = dataclasses.replace(own, lora=model.lora, quantise=model.quantise)
        sources["critic"] = critic
    return configs, {name: source.for_adapters(configs[name].lora).params for name, source in sources.items() if source}


def _frozen_networks(model: ModelConfig, reward: Source | None, reference: Source | None, mesh: Mesh, site: Site
                     ) -> tuple[PyTree, dict[str, ModelConfig]]:
    """Networks that come whole from a checkpoint: {"reward": …, "ref": …} on their shardings, and their configurations."""
    configs, trees = {}, {}
    for name, source, outputs in (("reward", reward, ("score",)), ("ref", reference, ("lm",))):
        if source is not None:
            configs[name] = _like(source.config, model, outputs)
            trees[name] = site.place(source.params, configs[name], mesh)
    return trees, configs


def _mesh(config: Mapping[str, Any], objective: Objective, given: Mesh | None) -> Mesh:
    """The run's devices, over which its rows divide."""
    section = config["mesh"]
    sizes = {axis: section[axis] for axis in distributed.AXES}
    mesh = given or distributed.make_mesh(sizes, section["devices"], slices=section["slices"], rules=section["rules"])
    check_lengths(config, mesh.shape["sequence"])
    if not all(sharding.host_rows(mesh, host)[0] for host in range(distributed.hosts())):
        raise UserError(f"config.mesh.devices = {config['mesh']['devices']} leaves a host of {distributed.hosts()} without a device: set it to 0")
    per_pass = trained_rows(config, objective) // (config["run"]["minibatches"] * config["run"]["microbatches"])
    if per_pass % sharding.row_devices(mesh):
        raise UserError(f"config.run.batch_size = {config['run']['batch_size']} gives {per_pass} rows a microbatch, which the "
                        f"{sharding.row_devices(mesh)} devices of config.mesh.{sharding.row_axes(mesh)} do not divide")
    if (fresh := config["run"]["batch_size"] - schedule.replayed_rows(config)) % sharding.row_devices(mesh):
        raise UserError(f"config.schedule.replay = {schedule.of(config).replay:g} leaves {fresh} rows to sample, which the "
                        f"{sharding.row_devices(mesh)} devices of config.mesh.{sharding.row_axes(mesh)} do not divide")
    return mesh


def assemble(config: Mapping[str, Any], objective: Objective, agree: Callable[[Mapping[str, Any]], None] | None = None, site: Site = HERE
             ) -> Experiment:
    """Opens and builds everything; nothing is written but prepared data.

    Args:
      config: checked (train.config.check).
      objective: bound.
      agree: is given what was opened, before the first program runs; from distributed.meeting where there are several hosts.
      site: where from and where to.

    Raises:
      UserError: a file, checkpoint, tokenizer or mesh that does not fit.
    """
    if site.real:
        distributed.initialize(config["mesh"]["multihost"], config["mesh"]["heartbeat"])  # before anything asks JAX for its devices
    online = config["data"]["kind"] == "prompt"
    init, tokenizer, template = text_side(config, site.source)
    model = _architecture(config, tokenizer, init)
    reference, cached = None, references.is_references(config["reference_from"])
    if config["reference_from"] not in ("", "init") and not cached:
        reference = _policy(site.source(config["reference_from"], "config.reference_from"), "config.reference_from")
        if not reference.reader("config.reference_from").reads_like(tokenizer):
            raise UserError(f"config.reference_from = {reference.path!r} reads another tokenizer than this run's")
    reward = site.source(config["reward_from"], "config.reward_from") if online and config["reward_from"] else None
    if reward is not None and reward.network != "reward":
        raise UserError(f"config.reward_from = {reward.path!r} is a {reward.network} checkpoint: name a reward model's run")
    if reward is not None and reward.reader("config.reward_from").digest == tokenizer.digest:
        longest = config["data"]["prompt_length"] + config["sampling"]["max_new_tokens"]
        if longest > reward.config.context:
            raise UserError(f"config.data.prompt_length + config.sampling.max_new_tokens = {longest} exceeds the context of {reward.config.context} "
                            f"that config.reward_from = {reward.path!r} was trained with")
    rewards = reward_networks.load(config, tokenizer, model, site.source) if online else {}
    critic = None
    if online and config["critic"]["kind"] == "separate" and config["critic"]["init_from"] not in ("", "policy"):
        critic = site.source(config["critic"]["init_from"], "config.critic.init_from")
        if not critic.reader("config.critic.init_from").reads_like(tokenizer):
            raise UserError(f"config.critic.init_from = {critic.path!r} reads another tokenizer than the policy: choose 'policy' or ''")
    elif online and config["critic"]["init_from"] == "policy":
        critic = init

    mesh = _mesh(config, objective, site.mesh)
    where = sharding.host_rows(mesh) if distributed.hosts() > 1 else (0, 1)
    train_data, valid_data, ptx_data = (site.datasets or datasets)(config, tokenizer, template, where)
    for name, one in (("train", train_data), ("valid", valid_data)):
        if cached and one is not None:
            references.attach(one.prepared, config["reference_from"], "config.reference_from", f"config.data.{name}")
    steps = config["run"]["steps"] or train_data.batches_for(config["run"]["data_epochs"], config["seed"])
    schedule.check_length(config, steps)
    if agree is not None:
        sets = {"train": train_data, "valid": valid_data, "ptx": ptx_data}
        sources = {"init_from": init, "reference_from": reference, "reward_from": reward, "critic.init_from": critic}
        agree({"data": {name: one.prepared.digest for name, one in sets.items() if one is not None},
               "weights": {name: one.meta.get("fingerprint") for name, one in sources.items() if one is not None},
               "tokenizer": tokenizer.digest, "template": template.digest})

    configs, loaded = _trained_networks(config, model, init, critic)
    frozen, frozen_configs = _frozen_networks(model, reward, reference, mesh, site)
    frozen |= reward_networks.placed(rewards, mesh, site.place)
    sampled: Mapping[str, Any] = config["sampling"] if online else {"temperature": 1.0, "cache": "same"}
    spec = NetworkSpec(**configs, **frozen_configs, temperature=sampled["temperature"], cache=sampled["cache"])
    plan, updates = schedule.of(config), config["run"]["epochs"] * config["run"]["minibatches"]
    tx, rate = optimizers.build(config["optimizer"], steps * updates, critic_first=plan.critic_only > 0)
    start = Start(config, objective, spec, tx, configs, loaded, mesh, frozen, real=site.real)
    frozen |= start.frozen(reference_is_start=config["reference_from"] == "init" and not plan.refresh)
    return Experiment(
        config=config, objective=objective, spec=spec, tokenizer=tokenizer, template=template, mesh=mesh, optimizer=tx, rate=rate, steps=steps,
        train_data=train_data, valid_data=valid_data, ptx_data=ptx_data, frozen=frozen, start=start, reward=reward, rewards=rewards,
        base=init.origin if init is not None and config["lora"]["rank"] else None,
        provenance=_provenance(init),
    )


def text_side(config: Mapping[str, Any], opened: Callable[..., Source] = load_source) -> tuple[Source | None, Tokenizer, ChatTemplate]:
    """The initial checkpoint, None without one, and the tokenizer and chat template that the run reads its data with.

    Args:
      config: checked.
      opened: `load_source`, or what stands for it.

    Raises:
      UserError: a checkpoint or a tokenizer that does not fit.
    """
    more = config["model"]["add_tokens"]
    init = opened(config["init_from"], "config.init_from", grows=bool(more)) if config["init_from"] else None
    if init is not None and more:
        init = init.with_tokens(hf_tokenizer.add_tokens(init.reader("config.init_from"), more).tokenizer)
    if init is not None and config["network"] == "policy":
        _policy(init, "config.init_from")
    tokenizer = _tokenizer(config, init)
    template = _template(config["data"]["template"], tokenizer, init)
    return init, hf_tokenizer.fitted(tokenizer, template), template


def datasets(config: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate, host: data.Host = (0, 1)) -> tuple[Any, Any, Any]:
    """The training set, the validation set (None without a file) and the second training set (None without config.ptx).

    Args:
      config: checked.
      tokenizer, template: from `text_side`.
      host: which rows this process makes, from sharding.host_rows.
    """
    section, second = config["data"], config.get("ptx")
    shared: dict[str, Any] = dict(
        tokenizer=tokenizer, template=template, cache=section["cache"] or data.default_cache(), host=host,
        batch_size=config["run"]["batch_size"],
    )
    open_one = functools.partial(
        data.open_dataset, section["kind"], max_length=section["max_length"], prompt_length=section["prompt_length"],
        overlong=section["overlong"], **shared,
    )
    group = config["sampling"]["group_size"] if section["kind"] == "prompt" else 1
    train = open_one(path=section["train"], pack=section["pack"], group_size=group, batch_size=shared["batch_size"] - schedule.replayed_rows(config))
    valid = open_one(path=section["valid"], pack=False, group_size=1) if section["valid"] else None
    ptx = None
    if second is not None:
        ptx = data.open_dataset(second["kind"], second["train"], max_length=second["max_length"], pack=second["pack"],
                                overlong=second["overlong"], **shared)
    return train, valid, ptx


def full_params(params: PyTree, frozen: PyTree) -> PyTree:
    """Every trained network whole: trained leaves merged with the frozen base, in the canonical layout. What a checkpoint's `params` holds."""
    return layout.to_canonical(merge(params, frozen.get("base")))
