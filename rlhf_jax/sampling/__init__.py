"""Sampling from a policy: prefill and a compiled decode, with filters composed from the config."""

from rlhf_jax.sampling.drawing import draw, pick, row_keys
from rlhf_jax.sampling.filters import Filters
from rlhf_jax.sampling.sampler import generate, generate_against

__all__ = ["Filters", "draw", "generate", "generate_against", "pick", "row_keys"]
