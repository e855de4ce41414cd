"""What a config must hold, checked in plain Python before JAX starts up: each mistake is one sentence with its key.

`check(config)` returns the values as nested dicts, ints made floats where a float is meant, and binds the objective. What needs files or
devices (data, checkpoints, the mesh) is checked where they are opened, still before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax import distributed, envs, objectives
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.models import families
from rlhf_jax.models.cache import KINDS as CACHES
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.ops.logit_filters import COLDEST
from rlhf_jax.rewards import entries
from rlhf_jax.sampling import filters
from rlhf_jax.train import optimizer, schedule
from rlhf_jax.types import Comparisons, Labelled, Rollout, Sequences, Unpaired


@dataclasses.dataclass(frozen=True)
class Number:
    """A legal range, both ends included unless `above` says otherwise."""

    kind: type
    low: float = float("-inf")
    high: float = float("inf")
    above: bool = False  # strictly above `low`

    def admits(self, value: Any) -> bool:
        return math.isfinite(value) and (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        name = "an int" if self.kind is int else "a finite float"
        low = f" {'>' if self.above else '≥'} {self.low:g}" if self.low > float("-inf") else ""
        return name + low + (f" and ≤ {self.high:.10g}" if self.high < float("inf") else "")


COUNT, NATURAL = Number(int, 0, 2**31 - 1), Number(int, 1, 2**31 - 1)  # counters are int32
RATIO = Number(float, 0.0, 1.0)
DECAY = Number(float, 0.0, 1.0 - 1e-9)  # of a moving average: at 1 it would never move

SCHEMA: dict[str, Any] = {
    "seed": COUNT,
    "network": ("policy", "reward"),  # which network trains
    "init_from": str,  # a run or checkpoint; "" draws fresh parameters
    "trainable": str,  # regular expression over parameter paths; ".*" trains all
    "objective": Mapping,
    "model": Mapping,
    "tokenizer": {"kind": ("byte", "bpe", "file", "inherit"), "path": str, "vocab_size": COUNT, "pad": str, "bos": str, "end": str},
    "data": {
        "kind": ("demo", "text", "preference", "ranking", "feedback", "rating", "stepwise", "prompt"),
        "train": str, "valid": str, "template": str, "max_length": NATURAL, "prompt_length": NATURAL, "pack": bool,
        "overlong": ("error", "truncate", "skip"), "cache": str,
    },
    "run": {
        "steps": COUNT, "data_epochs": Number(float, 0.0), "batch_size": NATURAL, "microbatches": NATURAL, "epochs": NATURAL,
        "minibatches": NATURAL, "max_nonfinite": NATURAL, "watchdog": Number(float, 0.0),  # seconds; 0 = off
    },
    "optimizer": {
        "name": optimizer.OPTIMIZERS, "lr": Number(float, 0.0, above=True), "schedule": optimizer.SCHEDULES, "warmup_steps": COUNT,
        "end_lr_ratio": RATIO, "b1": DECAY, "b2": DECAY, "eps": Number(float, 0.0, above=True), "muon_beta": DECAY,
        "weight_decay": Number(float, 0.0), "clip_norm": Number(float, 0.0), "ema_decay": DECAY, "moment_dtype": ("float32", "bfloat16"),
    },
    "validation": {"every": COUNT, "batches": COUNT, "metric": str, "mode": ("min", "max"), "patience": COUNT},
    "checkpoint": {"every": COUNT, "keep": NATURAL},
    "lora": {
        "rank": COUNT, "alpha": Number(float, 0.0, above=True), "targets": str, "dropout": Number(float, 0.0, 1.0 - 1e-9), "rslora": bool,
        "dora": bool, "base": ("same", "bfloat16", "int8", "nf4"),
    },
    "mesh": {
        "data": int, "fsdp": int, "expert": int, "sequence": int, "tensor": int, "devices": COUNT, "slices": NATURAL, "rules": distributed.RULES,
        "multihost": bool, "heartbeat": NATURAL,  # seconds
    },
    "log": {"every": NATURAL, "samples": COUNT, "tensorboard": bool, "wandb": str},
}
ONLINE: dict[str, Any] = {
    "reference_from": str,
    "reward_from": str,
    "reward_fn": str,
    "rewards": object,  # entries, checked by rewards.entries; in the place of reward_from and reward_fn
    "reward_normalise": bool,
    "reward_failure": {"policy": ("raise", "mask", "default"), "default": Number(float), "timeout": Number(float, 0.0)},  # timeout: seconds; 0 = none
    "env": {  # an environment between the turns of an episode, in the place of a reward; tokens: after the prompt, replies included
        "name": str, "max_turns": NATURAL, "max_tokens": NATURAL, "widths": NATURAL, "halvings": COUNT, "parameters": Mapping,
    },
    "fused": bool,
    "critic": {"kind": ("none", "shared", "separate"), "init_from": str},
    "sampling": {
        "group_size": NATURAL, "max_new_tokens": NATURAL, "temperature": Number(float, COLDEST), "top_k": COUNT,
        "top_p": Number(float, 0.0, 1.0, above=True), "filters": Sequence, "stop_strings": Sequence, "cache": CACHES, "slots": COUNT,
        "old_logps": ("trainer", "sampler"),
    },
    "schedule": {  # what each means: train.schedule
        "ahead": COUNT, "refill": COUNT, "replay": Number(float, 0.0, 1.0 - 1e-9), "capacity": COUNT, "refresh": COUNT, "critic_only": COUNT,
    },
}
OFFLINE: dict[str, Any] = {"reference_from": str}
RUNS = ("run", "reference")  # parameters of config.rewards' networks that name checkpoints
INHERIT = "inherit"  # config.model.family: the architecture of config.init_from
PTX: dict[str, Any] = {  # a second data set beside the rollouts, run.batch_size rows of it per iteration
    "kind": ("text", "demo"), "train": str, "max_length": NATURAL, "pack": bool, "overlong": ("error", "truncate", "skip"),
}
KINDS = {  # what fills a batch type; an objective's own `DATA` goes before it
    Sequences: ("demo", "text"), Comparisons: ("preference",), Unpaired: ("feedback",), Labelled: ("rating", "stepwise"), Rollout: ("prompt",),
}


def _typed(key: str, value: Any, want: Any) -> Any:
    """`value` if it is what `want` says, an int made a float where a float is meant."""
    if isinstance(want, tuple):
        if value not in want:
            raise UserError(f"{key} = {value!r}: must be one of {', '.join(want)}")
        return value
    number = want if isinstance(want, Number) else None
    kind = number.kind if number else want
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{key} = {value!r}: must be {number or 'a ' + kind.__name__}, got {type(value).__name__}")
    if number and not number.admits(value):
        raise UserError(f"{key} = {value!r}: must be {number}")
    return dict(value) if isinstance(value, Mapping) else value


def _conform(values: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` as `schema` says: no unknown key, none missing, each of its type."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} = {values!r}: must be a section with {', '.join(schema)}")
    for key in values:
        if key not in schema:
            raise UserError(f"{where}.{key} is not a config key{nearest(key, schema)}")
    missing = [key for key in schema if key not in values]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: write every value out")
    return {
        key: _conform(values[key], want, f"{where}.{key}") if isinstance(want, dict) else _typed(f"{where}.{key}", values[key], want)
        for key, want in schema.items()
    }


def plain(config: Any) -> dict[str, Any]:
    """A ConfigDict, or nested mappings, as plain dicts."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return {key: plain(value) if isinstance(value, Mapping) else value for key, value in config.items()}


def hosts(config: Any) -> tuple[bool, int]:
    """config.mesh.multihost and heartbeat, before the config is checked: one that `check` will refuse is no reason to wait for other hosts.

    Args:
      config: what a `get_config()` returned.
    """
    try:
        mesh = check(config, files=False)[0]["mesh"]
    except UserError:
        return False, 1
    return mesh["multihost"], mesh["heartbeat"]


def check(config: Any, *, files: bool = True) -> tuple[dict[str, Any], objectives.Objective]:
    """The config as plain checked dicts, and its objective, bound.

    Args:
      config: what a `get_config()` returned.
      files: whether the data and checkpoints that it names must be here; not for a run that is planned for other machines.

    Raises:
      UserError: the first mistake found, with its key, value and remedy.
    """
    values = plain(config)
    for name in ("objective", "data"):
        if not isinstance(values.get(name), dict):
            raise UserError(f"config.{name} = {values.get(name)!r}: must be a section")
    objective = objectives.bind(values["objective"])
    kinds = objective.data or KINDS.get(objective.batch_type)
    if kinds is None:
        names = ", ".join(t.__name__ for t in KINDS)
        raise UserError(f"config.objective.name = {objective.name!r} trains on {objective.batch_type.__name__}, which no data kind fills: "
                        f"annotate its batch with one of {names}")
    if values["data"].get("kind") not in kinds:
        raise UserError(f"config.data.kind = {values['data'].get('kind')!r}: {objective.name} trains on {' or '.join(kinds)} data")
    online = objective.batch_type is Rollout
    _check_ptx(values, objective, online)
    c = _conform(values, {**SCHEMA, **(ONLINE if online else OFFLINE), **({"ptx": PTX} if "ptx" in objective.needs else {})}, "config")
    model = _model(c)
    for key, pattern in (("trainable", c["trainable"]), ("lora.targets", c["lora"]["targets"])):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.{key} = {pattern!r} is not a regular expression: {error}") from error
    _check_run(c, model, objective, online)
    _check_needs(c, objective, online)
    if online:
        schedule.check(c, objective)
    if files:
        _check_files(c)
    return c, objective


def _model(c: Mapping[str, Any]) -> ModelConfig:
    """The model section as a fresh network, for checks; with "inherit" its sizes are another's and only the run's own choices hold."""
    section = c["model"]
    if "add_tokens" not in section:
        raise UserError("config.model lacks add_tokens: write every value out")
    added = section["add_tokens"]
    if isinstance(added, str) or not all(isinstance(token, str) and token for token in added):
        raise UserError(f"config.model.add_tokens = {added!r}: must be a tuple of strings, e.g. ('<|tool|>',)")
    if added and not c["init_from"]:
        raise UserError(f"config.model.add_tokens = {added!r} adds to the tokenizer of config.init_from, which names none: train a tokenizer instead")
    if section.get("family") == INHERIT:
        if not c["init_from"]:
            raise UserError("config.model.family = 'inherit' needs config.init_from, whose architecture it takes")
        section = {**section, "family": "llama"}
    return fresh_model(section, ())


def fresh_model(section: Mapping[str, Any], outputs: tuple[str, ...]) -> ModelConfig:
    """The network that a config's model section writes out, its family's choices where it writes none.

    Args:
      section: config.model; its family is not "inherit".
      outputs: the heads.

    Raises:
      UserError: an unknown family or key, a missing key, or a value out of range.
    """
    fields = {key: value for key, value in section.items() if key != "add_tokens"}
    return ModelConfig.create({**families.fresh(fields["family"]), **fields} if "family" in fields else fields, outputs)


def _check_ptx(values: Mapping[str, Any], objective: objectives.Objective, online: bool) -> None:
    """The section of the second data set is there exactly when the objective trains on one."""
    name, needed = objective.name, "ptx" in objective.needs
    if needed and not online:
        raise UserError(f"config.objective.name = {name!r} needs a second data set, which goes with rollouts only: annotate its batch with Rollout")
    if needed and "ptx" not in values:
        raise UserError(f"config.ptx is missing: {name} trains on a second data set beside its samples; write the section out with "
                        f"{', '.join(PTX)}, as configs/ppo_ptx.py does")
    if not needed and "ptx" in values:
        raise UserError(f"config.ptx: {name} with these hyper-parameters trains on no second data set; take the section out")


def trained_rows(config: Mapping[str, Any], objective: objectives.Objective) -> int:
    """Rows that an update is cut from: those of a batch, or half of them where two completions make a pair.

    Args:
      config: checked, or as far as config.run.
      objective: bound.
    """
    return config["run"]["batch_size"] // (2 if "pairs" in objective.needs else 1)


def check_lengths(c: Mapping[str, Any], spread: int) -> None:
    """Whether the devices of config.mesh.sequence divide the rows that train.

    Args:
      c: checked.
      spread: those devices.

    Raises:
      UserError: they do not.
    """
    if c["data"]["kind"] == "prompt":
        new = "config.env.max_tokens" if c["env"]["name"] else "config.sampling.max_new_tokens"
        section, key = new.split(".")[1:]
        lengths = {f"config.data.prompt_length + {new}": c["data"]["prompt_length"] + c[section][key]}
    else:
        lengths = {"config.data.max_length": c["data"]["max_length"]}
    lengths |= {"config.ptx.max_length": c["ptx"]["max_length"]} if "ptx" in c else {}
    for key, length in lengths.items():
        if length % spread:
            raise UserError(f"{key} = {length} is no multiple of config.mesh.sequence = {spread}, the devices over which a row is spread: choose one")


def _check_run(c: Mapping[str, Any], model: ModelConfig, objective: objectives.Objective, online: bool) -> None:
    run, data = c["run"], c["data"]
    if (run["steps"] > 0) == (run["data_epochs"] > 0):
        raise UserError(f"config.run.steps = {run['steps']} and config.run.data_epochs = {run['data_epochs']:g}: set exactly one of them")
    parts, rows = run["microbatches"] * run["minibatches"], trained_rows(c, objective)
    paired = "" if rows == run["batch_size"] else f", {rows} pairs,"
    if rows % parts:
        raise UserError(f"config.run.batch_size = {run['batch_size']}{paired} does not divide into minibatches × microbatches = {parts}: "
                        "choose a multiple")
    sizes = [c["mesh"][axis] for axis in ("data", "fsdp", "expert")]
    if min(sizes) > 0 and (rows // parts) % math.prod(sizes):
        raise UserError(f"config.run.batch_size = {run['batch_size']}{paired} gives {rows // parts} rows a microbatch, which the "
                        f"{math.prod(sizes)} devices of config.mesh.data × fsdp × expert do not divide")
    if c["network"] == "reward" and online:
        raise UserError("config.network = 'reward': a reward model trains on judged responses, not on prompts")
    if c["validation"]["every"] and not data["valid"]:
        raise UserError("config.validation.every is set but config.data.valid is empty: name a validation file, or set every = 0")
    if not online:
        if data["max_length"] > model.context:
            raise UserError(f"config.data.max_length = {data['max_length']} exceeds config.model.context = {model.context}")
        return
    if "ptx" in c and c["ptx"]["max_length"] > model.context:
        raise UserError(f"config.ptx.max_length = {c['ptx']['max_length']} exceeds config.model.context = {model.context}")
    sampling = c["sampling"]
    filters.check(sampling["filters"], sampling["stop_strings"], max_new_tokens=sampling["max_new_tokens"])
    if run["batch_size"] % sampling["group_size"]:
        raise UserError(f"config.run.batch_size = {run['batch_size']} completions do not divide into groups of "
                        f"config.sampling.group_size = {sampling['group_size']}")
    if slots := sampling["slots"]:
        devices = math.prod(sizes) if min(sizes) > 0 else 1
        if slots % sampling["group_size"] or slots % devices or (slots % 2 and objective.opponent is not None):
            raise UserError(f"config.sampling.slots = {slots}: choose a multiple of config.sampling.group_size = {sampling['group_size']} and of the "
                            f"{devices} devices that rows are split over, even where an opponent draws; 0 decodes the whole batch at once")
    if c["env"]["name"]:
        _check_env(c, model, objective)
    elif c["env"]["parameters"]:
        raise UserError(f"config.env.parameters = {c['env']['parameters']!r} are nobody's with config.env.name = '': name the environment, or take "
                        "them out")
    elif data["prompt_length"] + sampling["max_new_tokens"] > model.context:
        raise UserError(f"config.data.prompt_length + config.sampling.max_new_tokens = {data['prompt_length']} + "
                        f"{sampling['max_new_tokens']} exceeds config.model.context = {model.context}")
    if model.dropout > 0:
        raise UserError(f"config.model.dropout = {model.dropout}: set it to 0 in online RL, or the first policy ratio is not 1")
    critic = c["critic"]
    if critic["kind"] != "separate" and critic["init_from"] not in ("", "policy"):
        raise UserError(f"config.critic.init_from = {critic['init_from']!r} has no effect with config.critic.kind = {critic['kind']!r}: "
                        "set kind = 'separate', or init_from = ''")


def _check_env(c: Mapping[str, Any], model: ModelConfig, objective: objectives.Objective) -> None:
    """What episodes of several turns ask of the rest."""
    section, length = c["env"], c["data"]["prompt_length"]
    envs.load(section["name"], section["parameters"])
    if length + section["max_tokens"] > model.context:
        raise UserError(f"config.data.prompt_length + config.env.max_tokens = {length} + {section['max_tokens']} exceeds config.model.context = "
                        f"{model.context}")
    if c["sampling"]["max_new_tokens"] > section["max_tokens"]:
        raise UserError(f"config.sampling.max_new_tokens = {c['sampling']['max_new_tokens']} of one turn exceed config.env.max_tokens = "
                        f"{section['max_tokens']} of a whole episode")
    if objective.opponent is not None:
        raise UserError(f"config.env.name = {section['name']!r}: {objective.name} lets an opponent draw every second sample, and "
                        "opponents play no episodes; set it to ''")
    if c["mesh"]["multihost"]:
        raise UserError(f"config.env.name = {section['name']!r} and config.mesh.multihost = True: episodes are played by one host")
    if schedule.of(c).staged:
        raise UserError(f"config.env.name = {section['name']!r}: episodes are trained on in the iteration that plays them; set "
                        "config.schedule.ahead, refill and replay to 0")
    if c["sampling"]["slots"]:
        raise UserError(f"config.sampling.slots = {c['sampling']['slots']}: with config.env.name = {section['name']!r} all rows take their turns "
                        "together; set it to 0")


def _check_needs(c: Mapping[str, Any], objective: objectives.Objective, online: bool) -> None:
    """What the objective's module says that the run must have."""
    name, needs = objective.name, objective.needs
    if "reference" in needs and not c["reference_from"]:
        raise UserError(f"config.reference_from = '': {name} compares the policy with a reference; name a run, or 'init' for the initial policy")
    if "teacher" in needs and not c["reference_from"]:
        raise UserError(f"config.reference_from = '': {name} learns from a teacher; name its run")
    if not online:
        return
    if "critic" in needs and c["critic"]["kind"] == "none":
        raise UserError(f"config.critic.kind = 'none': {name} needs values; choose 'separate' or 'shared'")
    if "group" in needs and c["sampling"]["group_size"] < 2:
        raise UserError(f"config.sampling.group_size = {c['sampling']['group_size']}: {name} compares samples of one prompt with each other, "
                        "at least 2 of them")
    if ("pairs" in needs or objective.opponent is not None) and c["sampling"]["group_size"] % 2:
        raise UserError(f"config.sampling.group_size = {c['sampling']['group_size']}: {name} takes the samples of a prompt two by two; choose an "
                        "even number")
    if objective.opponent is not None and c["sampling"]["old_logps"] == "sampler":
        raise UserError(f"config.sampling.old_logps = 'sampler': {name} draws every second row from an opponent, whose log-probs are not the "
                        "policy's; choose 'trainer'")
    given = {key: c[key] for key in ("reward_from", "reward_fn", "rewards") if c[key]}
    if environment := c["env"]["name"]:
        given["env.name"] = environment
    if "reward" in needs and len(given) != 1:
        raise UserError(f"config.reward_from = {c['reward_from']!r}, config.reward_fn = {c['reward_fn']!r}, config.rewards = {c['rewards']!r} and "
                        f"config.env.name = {environment!r}: set exactly one of them")
    if "reward" not in needs and given:
        key, value = next(iter(given.items()))
        raise UserError(f"config.{key} = {value!r}: {name} reads no score; set it to {type(value)()!r}")


def _check_files(c: Mapping[str, Any]) -> None:
    if c["tokenizer"]["kind"] == "inherit" and not c["init_from"]:
        raise UserError("config.tokenizer.kind = 'inherit' needs config.init_from, whose tokenizer it takes")
    if c["tokenizer"]["kind"] == "file" and not os.path.exists(c["tokenizer"]["path"]):
        raise UserError(f"config.tokenizer.path = {c['tokenizer']['path']!r}: no such file; name a tokenizer.json")
    files = {"data.train": c["data"]["train"], "data.valid": c["data"]["valid"]} | ({"ptx.train": c["ptx"]["train"]} if "ptx" in c else {})
    for key, path in files.items():
        if not path and key != "data.valid":
            raise UserError(f"config.{key} is empty: name a JSONL file or a folder of them")
        if path and not os.path.exists(path):
            raise UserError(f"config.{key} = {path!r}: no such file or folder")
    runs = {key: c.get(key, "") for key in ("init_from", "reference_from", "reward_from")}
    for entry in entries.parse(c.get("rewards", ())):  # offline there is no such key
        if entry.function is None:
            runs |= {f"{entry.key.removeprefix('config.')}.{name}": path for name, path in entry.parameters.items() if name in RUNS}
    for key, path in runs.items():
        if path and not (key == "reference_from" and path == "init") and "://" not in path and not os.path.exists(path):
            raise UserError(f"config.{key} = {path!r}: no such run or checkpoint")
