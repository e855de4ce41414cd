"""Sampling from a policy: prefill and a scanned decode."""

from rlhf_jax.sampling.sampler import draw, generate, generate_against, row_keys

__all__ = ["draw", "generate", "generate_against", "row_keys"]
