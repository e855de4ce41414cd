"""Sampling from a policy: prefill and a compiled decode, with filters composed from the config."""

from rlhf_jax.sampling.best import best_of, kl_bound
from rlhf_jax.sampling.drawing import pick, row_keys
from rlhf_jax.sampling.filters import NONE, Filters
from rlhf_jax.sampling.sampler import generate, generate_against

__all__ = ["NONE", "Filters", "best_of", "generate", "generate_against", "kl_bound", "pick", "row_keys"]
