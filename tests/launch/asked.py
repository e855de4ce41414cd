"""A request to plan from, and a config that fits it."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from rlhf_jax.cli.configs import load_config
from rlhf_jax.launch import topologies
from rlhf_jax.launch.request import Request, checked_here
from rlhf_jax.train.config import check

ROOT = pathlib.Path(__file__).parents[2]
BASE = Request(
    backend="queued", name="ppo-1", topology=topologies.parse("v5e:4x4"), slices=1, workdir="gs://bucket/runs/ppo-1", project="proj",
    zone="us-west4-a", spot=True, runtime="", service_account="", code="tree", root=".", image="", cluster="", secrets=(), max_restarts=5,
    max_preemptions=100, experiment="", pipeline_flags=(), keep=False, folder="plan",
)


def request(**changes: Any) -> Request:
    """The base request with some fields replaced; a topology by its name."""
    if isinstance(changes.get("topology"), str):
        changes["topology"] = topologies.parse(changes["topology"])
    if changes.get("backend") == "xpk":
        changes = {"cluster": "c1", **changes}
    return dataclasses.replace(BASE, **changes)


def config(**changes: Any) -> dict[str, Any]:
    """configs/ppo.py, checked, with its files in a bucket; changes are section__key=value."""
    values = load_config(f"{ROOT}/configs/ppo.py")
    values.data.train, values.init_from, values.reward_from = "gs://bucket/data/prompts.jsonl", "gs://bucket/runs/sft", "gs://bucket/runs/reward"
    values.mesh.multihost = True
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values[section] if section else values)[key] = value
    return checked_here(values.to_dict(), check)
