"""The networks: the only room that knows Flax Linen."""

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.networks import Networks, NetworkSpec

__all__ = ["ModelConfig", "NetworkSpec", "Networks"]
