"""The networks that entries of config.rewards name: reward models, and policies whose implicit reward is read against a reference.

They never train. Each entry's trees travel in `frozen["rewards"][label]`, so that they are sharded and passed to the compiled programs like any other
frozen network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig
from rlhf_jax.models.config import RUNTIME
from rlhf_jax.rewards.entries import Entry, parse
from rlhf_jax.saved import Source, load_source, place
from rlhf_jax.types import PyTree

OUTPUTS = {"reward": ("score",), "policy": ("lm",), "reference": ("lm",)}


@dataclasses.dataclass(frozen=True)
class RewardNetwork:
    """One network of an entry."""

    source: Source
    config: ModelConfig  # as it runs here


def load(config: Mapping[str, Any], tokenizer: Tokenizer, model: ModelConfig, opened: Callable[..., Source] = load_source
         ) -> dict[str, dict[str, RewardNetwork]]:
    """{label: {"reward": …} or {"policy": …, "reference": …}} of the entries that are networks.

    Args:
      config: checked.
      tokenizer: the policy's.
      model: the policy, whose precision and layout they run with.
      opened: `load_source`, or what stands for it.

    Raises:
      UserError: a checkpoint that cannot serve.
    """
    found = {}
    for entry in parse(config["rewards"]):
        if entry.name == "learned":
            found[entry.share.label] = {"reward": _network(entry, "run", "reward", tokenizer, model, config, opened)}
        elif entry.name == "implicit":
            roles = (("run", "policy"), ("reference", "reference"))
            found[entry.share.label] = {role: _network(entry, key, role, tokenizer, model, config, opened) for key, role in roles}
    return found


def _network(entry: Entry, key: str, role: str, tokenizer: Tokenizer, model: ModelConfig, config: Mapping[str, Any],
             opened: Callable[..., Source]) -> RewardNetwork:
    where = f"{entry.key}.{key}"
    source = opened(entry.parameters[key], where)
    if (source.network == "reward") != (role == "reward"):
        wanted = "a reward model's run" if role == "reward" else "a policy's run"
        raise UserError(f"{where} = {source.path!r} is a {source.network} checkpoint: name {wanted}")
    shared = source.reader(where).digest == tokenizer.digest
    if role != "reward" and not source.reader(where).reads_like(tokenizer):
        raise UserError(f"{where} = {source.path!r} reads another tokenizer than this run's, whose tokens its log-probs are of")
    longest = config["data"]["prompt_length"] + config["sampling"]["max_new_tokens"]
    if (shared or role != "reward") and longest > source.config.context:
        raise UserError(f"config.data.prompt_length + config.sampling.max_new_tokens = {longest} exceeds the context of {source.config.context} that "
                        f"{where} = {source.path!r} was trained with")
    runtime = {name: getattr(model, name) for name in RUNTIME if name not in ("context", "dropout")}
    return RewardNetwork(source, dataclasses.replace(source.config, **runtime, outputs=OUTPUTS[role]))


def placed(networks: Mapping[str, Mapping[str, RewardNetwork]], mesh: Mesh, put: Callable[[PyTree, ModelConfig, Mesh], PyTree] = place) -> PyTree:
    """What goes into `frozen` beside the other networks: {"rewards": {label: {role: parameters}}}, {} without any.

    Args:
      networks: from `load`.
      mesh: where.
      put: saved.place, or what stands for it.
    """
    trees = {label: {role: put(one.source.params, one.config, mesh) for role, one in roles.items()} for label, roles in networks.items()}
    return {"rewards": trees} if trees else {}
