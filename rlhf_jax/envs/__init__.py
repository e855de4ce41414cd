"""Environments: what answers the policy between its turns, and what its episodes are worth. See README.md."""

from rlhf_jax.envs.protocol import Environment, Step
from rlhf_jax.envs.registry import NAMES, load
from rlhf_jax.envs.tasks import sample_file, write_task

__all__ = ["NAMES", "Environment", "Step", "load", "sample_file", "write_task"]
