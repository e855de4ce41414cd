"""The folder `job/` that every machine gets, whatever the backend: what to install, the config, and what the worker does.

The config travels resolved, as one file with every value, so that what a dry run shows is what trains. Its data in a bucket is fetched to the
machines' disks (readers index local files), and it names the fetched copies.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from rlhf_jax.launch.plan import File
from rlhf_jax.launch.request import FILES, PACKAGE, TREE, Request, value_at

HERE = os.path.dirname(os.path.abspath(__file__))
EXTRAS = "tpu,gcs"  # of pyproject.toml
CONFIG, JOB, REQUIREMENTS, RUN, CODE = "config.py", "job.json", "requirements.txt", "run.sh", "code.tar.gz"


def files(request: Request, config: Mapping[str, Any] | None) -> tuple[File, ...]:
    """What lies in `job/`, without the packed code.

    Args:
      request: checked.
      config: checked; None for an experiment.
    """
    fetched = {} if config is None else _fetched(config)
    made = {RUN: _script("run.sh"), REQUIREMENTS: _requirements(request.code), JOB: _job(request, fetched)}
    if config is not None:
        made[CONFIG] = _config_file(config, fetched)
    return tuple(File(f"{folder(request)}/{name}", text) for name, text in sorted(made.items()))


def folder(request: Request) -> str:
    """Where the job's folder is written on this machine."""
    return f"{request.folder}/job"


def _script(name: str) -> str:
    with open(os.path.join(HERE, name), encoding="utf-8") as stream:
        return stream.read()


def _requirements(code: str) -> str:
    """pip's requirements file: the unpacked tree, or the package from an index or a repository."""
    if code == TREE:
        return f"--editable ./code[{EXTRAS}]\n"
    if code.startswith("git+"):
        return f"rlhf-jax[{EXTRAS}] @ {code}\n"
    name, version = re.fullmatch(r"([A-Za-z0-9._-]+)(.*)", code).groups()  # type: ignore[union-attr]
    return f"{name}[{EXTRAS}]{version}\n"


def _fetched(config: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[str, str]]:
    """Keys of files in a bucket → (there, on the machine, relative to where the command runs)."""
    found = {keys: value_at(config, keys) for keys in FILES}
    return {keys: (path, f"../inputs/{'.'.join(keys)}/{path.rstrip('/').rpartition('/')[2]}") for keys, path in found.items() if "://" in path}


def _job(request: Request, fetched: Mapping[tuple[str, ...], tuple[str, str]]) -> str:
    command = ["rlhf-jax", "train", "--config", f"../{CONFIG}", "--workdir", request.workdir]
    if request.experiment:
        command = ["python", f"experiments/{request.experiment}/pipeline.py", "--workdir", "../work", *request.pipeline_flags]
    job = {
        "run_id": request.name,
        "command": command,
        "inputs": [list(pair) for pair in fetched.values()],
        "mirror": request.workdir if request.experiment else "",  # a pipeline keeps local files; they are copied to and from here
        "reports": request.bucket,
        "secrets": {} if request.backend == "sky" else {name: f"projects/{request.project}/secrets/{secret}" for name, secret in request.secrets},
        "max_restarts": request.max_restarts,
    }
    return json.dumps(job, indent=2) + "\n"


def _config_file(config: Mapping[str, Any], fetched: Mapping[tuple[str, ...], tuple[str, str]]) -> str:
    resolved = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for (section, key), (_, local) in fetched.items():
        resolved[section][key] = local
    return ('"""The resolved config of this run; written by `rlhf-jax launch`."""\n\n'
            "import math\nimport os\n\nimport rlhf_jax\nfrom ml_collections import ConfigDict\n\nPACKAGE = os.path.dirname(rlhf_jax.__file__)\n\n\n"
            f'def get_config(arg: str = "") -> ConfigDict:\n    return ConfigDict({_literal(resolved, 1)})\n')


def _literal(value: Any, depth: int) -> str:
    """Python source of a config's value."""
    pad, end = "    " * (depth + 1), "    " * depth
    if isinstance(value, Mapping):
        rows = "".join(f"{pad}{key!r}: {_literal(item, depth + 1)},\n" for key, item in value.items())
        return f"{{\n{rows}{end}}}" if rows else "{}"
    if isinstance(value, list | tuple):
        inside = ", ".join(_literal(item, depth) for item in value)
        return f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and not math.isfinite(value):
        return {"inf": "math.inf", "-inf": "-math.inf"}.get(str(value), "math.nan")
    if isinstance(value, str) and value.startswith(PACKAGE + os.path.sep):
        return f"PACKAGE + {value.removeprefix(PACKAGE)!r}"
    return repr(value)
