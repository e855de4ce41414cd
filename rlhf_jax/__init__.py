"""rlhf_jax: align language models on TPUs. Pure functions on pytrees; see README.md for the map."""

__version__ = "0.1.0"
