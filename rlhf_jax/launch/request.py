"""What a user asks `rlhf-jax launch` for, and what is refused before a plan is made of it."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.launch.topologies import Topology, shapes

TREE = "tree"  # --code: the working tree, packed
AXES = ("data", "fsdp", "expert", "sequence", "tensor")
# Config keys that name files or folders on disk; a run or a checkpoint may as well lie in a bucket, which is read in place.
FILES = (("data", "train"), ("data", "valid"), ("ptx", "train"), ("tokenizer", "path"), ("data", "template"))
RUNS = (("init_from",), ("reference_from",), ("reward_from",), ("critic", "init_from"))
WORDS = ("", "init", "policy")  # what else these keys may hold

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")  # of machines and workloads; xpk and Kubernetes allow 40 characters
CODE = re.compile(r"git\+(https|ssh)://[^\s#]+|[A-Za-z0-9][A-Za-z0-9._-]*(\s*[=<>!~]=?[^\s]+)?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"[A-Za-z0-9_-]{1,255}")  # a secret's name in Secret Manager
# Beginnings of credentials in use: Hugging Face, OpenAI and Anthropic, GitHub, GitLab, Google, AWS, Slack, and a private key.
CREDENTIAL = re.compile(r"\b(hf_|sk-|gh[opsu]_|github_pat_|glpat-|AIza|ya29\.|GOCSPX-|AKIA|xox[abps]-)[A-Za-z0-9_-]{8,}|-----BEGIN")


@dataclasses.dataclass(frozen=True)
class Request:
    """The flags of a launch, parsed."""

    backend: str
    name: str  # of the machines and of the run: the same at every restart
    topology: Topology
    slices: int
    workdir: str  # gs://…
    project: str
    zone: str
    spot: bool
    runtime: str  # TPU VM software version; "" = the generation's
    service_account: str  # of the machines; "" = the project's default one
    code: str  # TREE, or what pip installs
    root: str  # the working tree
    image: str  # base image of the containers, for xpk
    cluster: str  # for xpk
    secrets: tuple[tuple[str, str], ...]  # (environment variable, name of the secret)
    max_restarts: int  # after crashes, on the machines
    max_preemptions: int
    experiment: str  # runs experiments/NAME/pipeline.py in place of a config; "" = a config
    pipeline_flags: tuple[str, ...]
    keep: bool  # leave the machines up at the end; xpk and sky decide that themselves
    folder: str  # where the plan's files are written

    @property
    def bucket(self) -> str:
        """What the launch itself keeps in the bucket: code, logs, outcomes."""
        return f"{self.workdir.rstrip('/')}/launch"

    @property
    def processes(self) -> int:
        """Machines in all, each with one process."""
        return self.slices * (self.topology.gke_hosts if self.backend == "xpk" else self.topology.hosts)


def parse_secrets(texts: tuple[str, ...] | list[str]) -> tuple[tuple[str, str], ...]:
    """`VARIABLE=NAME` or `VARIABLE`, which names a secret of the same name.

    Raises:
      UserError: not a name, or what looks like the secret itself; its text is not repeated.
    """
    pairs = []
    for text in texts:
        variable, given, name = text.partition("=")
        name = name if given else variable
        if not VARIABLE.fullmatch(variable):
            raise UserError("--secret takes VARIABLE=NAME: an environment variable, and the name of a secret in Secret Manager")
        if CREDENTIAL.search(name) or _random(name) or not SECRET.fullmatch(name):
            raise UserError(f"--secret {variable}=…: what follows looks like the secret itself; store it once with `gcloud secrets create NAME "
                            f"--data-file=-`, and write --secret {variable}=NAME")
        pairs.append((variable, name))
    return tuple(pairs)


def _random(text: str) -> bool:
    """Whether nobody would give a thing this name: many hex digits, or a long mixture of cases and digits."""
    mixed = (all(re.search(kind, piece) for kind in ("[a-z]", "[A-Z]", "[0-9]")) for piece in re.findall(r"[A-Za-z0-9]{24,}", text))
    return bool(re.search(r"\b[0-9a-fA-F]{32,}\b", text)) or any(mixed)


def check_identity(one: Request, in_bucket: bool) -> None:
    """Refuses flags that do not say which run is meant.

    Args:
      one: the request.
      in_bucket: whether the run's folder is needed.

    Raises:
      UserError: the first mistake, with its flag, value and remedy.
    """
    if not NAME.fullmatch(one.name):
        raise UserError(f"--name {one.name!r}: up to 40 lower-case letters, digits and hyphens, the first a letter and the last no hyphen")
    if in_bucket and not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+/.*[^/].*", one.workdir):
        raise UserError(f"--workdir {one.workdir!r}: machines come and go, so name a folder of a bucket, like gs://BUCKET/runs/{one.name}")
    if bool(one.cluster) != (one.backend == "xpk"):
        raise UserError("--cluster is missing: name the cluster that `xpk cluster create` made" if one.backend == "xpk"
                        else f"--cluster {one.cluster!r} goes with --backend xpk only")
    for flag, value in (("project", one.project), ("zone", one.zone)):
        if not value and one.backend != "sky":
            raise UserError(f"--{flag} is missing: name the Google Cloud {flag} of the machines")


def check(one: Request) -> None:
    """Refuses flags that cannot work.

    Raises:
      UserError: the first mistake, with its flag, value and remedy.
    """
    check_identity(one, in_bucket=True)
    if one.slices < 1 or (one.slices > 1 and one.backend in ("tpu-vm", "sky")):
        raise UserError(f"--slices {one.slices}: {one.backend} makes one slice; use --backend queued or xpk for more"
                        if one.slices > 1 else f"--slices {one.slices} must be at least 1")
    if min(one.max_restarts, one.max_preemptions) < 0:
        raise UserError(f"--max-restarts {one.max_restarts} and --max-preemptions {one.max_preemptions} must be 0 or more")
    if one.code != TREE and not CODE.fullmatch(one.code):
        raise UserError(f"--code {one.code!r}: tree, git+https://…@REF, or a requirement like rlhf-jax==0.1.0")
    if one.experiment and (one.code != TREE or one.processes > 1):
        raise UserError(f"--experiment {one.experiment!r} is part of the tree: leave out --code {one.code}" if one.code != TREE else
                        f"--experiment {one.experiment!r} keeps files beside its runs, so it takes one host, and {one.topology.name} × {one.slices} "
                        f"has {one.processes}: choose v5e:2x4 or v6e:2x4 (v5e:2x4 has two under xpk)")
    if one.backend == "sky" and any(variable != name for variable, name in one.secrets):
        raise UserError("--secret VARIABLE=NAME: sky takes the variable itself, from where it is called: write --secret VARIABLE")
    if one.image and one.backend != "xpk":
        raise UserError(f"--image {one.image!r} goes with --backend xpk only: on {one.backend} the machine's image is --runtime-version")
    if one.runtime and one.backend == "xpk":
        raise UserError(f"--runtime-version {one.runtime!r}: xpk's machines run containers; name one with --image")
    for text in (one.workdir, one.code, one.image, one.service_account, *one.pipeline_flags):
        if CREDENTIAL.search(text):
            raise UserError("a flag holds what looks like a credential; store it with `gcloud secrets create`, and name it with --secret V=NAME")
    _check_topology(one)


def _check_topology(one: Request) -> None:
    slice_, generation = one.topology, one.topology.generation
    if one.backend == "xpk" and slice_.chips < generation.gke_least:
        raise UserError(f"--topology {slice_.name}: the smallest slice of xpk is {generation.name}:{_text(generation.gke_least)}")
    if one.backend != "xpk" and not slice_.usual and not (generation.by_shape and one.backend != "sky"):
        raise UserError(f"--topology {slice_.name}: {one.backend} takes a size only, {slice_.accelerator}, which is "
                        f"{_usual(slice_).name}; use that, or --backend xpk")


def _text(chips: int) -> str:
    return {4: "2x2", 8: "2x4"}.get(chips, "1x1")


def _usual(slice_: Topology) -> Topology:
    alike = [Topology(slice_.generation, shape) for shape in shapes(slice_.generation.name) if math.prod(shape) == slice_.chips]
    return next(one for one in alike if one.usual)


def check_config(request: Request, config: Mapping[str, Any]) -> None:
    """Refuses a config that cannot run on these machines.

    Args:
      request: checked.
      config: plain and checked (`train.config.check`).

    Raises:
      UserError: the first mistake, with its key, value and remedy.
    """
    for key, value in _strings(config, "config"):
        if CREDENTIAL.search(value):
            raise UserError(f"{key} holds what looks like a credential: leave it out, and name it with --secret VARIABLE=NAME")
    check_mesh(config["mesh"], request.topology.chips * request.slices)
    if request.processes > 1 and not config["mesh"]["multihost"]:
        raise UserError(f"config.mesh.multihost = False, but {request.topology.name} × {request.slices} has {request.processes} hosts: "
                        "add --config.mesh.multihost=True")
    for path, value in local_paths(config):
        raise UserError(f"config.{path} = {value!r}: the machines of {request.topology.name} do not have this file; copy it with "
                        f"`gcloud storage cp --recursive {value} {request.workdir.rstrip('/')}/inputs/` and name that")


def check_mesh(mesh: Mapping[str, Any], chips: int) -> None:
    """The mesh's product against the chips that there will be.

    Raises:
      UserError: they differ.
    """
    sizes = {axis: int(mesh[axis]) for axis in AXES if axis in mesh}
    used = int(mesh["devices"]) or chips
    known = math.prod(size for size in sizes.values() if size != -1)
    fits = known and (used % known == 0 if -1 in sizes.values() else used == known)
    if not fits or used != chips:
        said = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(f"config.mesh has {said}, devices={mesh['devices']}, which does not make the {chips} chips asked for: the product must equal "
                        "them (one axis may be -1, and devices = 0 means all)")


def value_at(config: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """The text under these keys, "" where there is none."""
    node: Any = config
    for key in keys:
        node = node.get(key, "") if isinstance(node, Mapping) else ""
    return node if isinstance(node, str) else ""


def local_paths(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, path) of everything that the config would read from this machine's disk; what comes with the package does not count."""
    found = [(".".join(keys), value_at(config, keys)) for keys in FILES + RUNS]
    for number, entry in enumerate(config.get("rewards", ())):
        found += [(f"rewards[{number}].{key}", value) for key, value in entry.items() if isinstance(value, str) and os.path.exists(value)]
    for key, value in found:
        named = key == "data.template" and os.path.sep not in value  # a template of the package
        if value not in WORDS and not named and "://" not in value and not value.startswith(PACKAGE + os.path.sep):
            yield key, value


def checked_here(config: dict[str, Any], check: Callable[[dict[str, Any]], tuple[dict[str, Any], Any]]) -> dict[str, Any]:
    """The config as the trainer's own check returns it, which looks for files: those in a bucket are the machines' business and stand aside.

    Args:
      config: plain; it is changed.
      check: `train.config.check`.
    """
    away = {keys: value for keys in FILES if "://" in (value := value_at(config, keys))}
    for section, key in away:
        config[section][key] = "plain" if key == "template" else os.devnull
    checked, _ = check(config)
    for (section, key), value in away.items():
        checked[section][key] = value
    return checked


def _strings(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _strings(value, f"{key}.{name}")
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _strings(value, f"{key}[{number}]")
    elif isinstance(node, str):
        yield key, node
