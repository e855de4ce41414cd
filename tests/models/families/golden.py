"""The fixtures: folders that transformers wrote, opened as a user's directory is, and what transformers computed with them (reference_models.py)."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import ModelConfig, families, layout
from rlhf_jax.models.hf.export import write_directory
from rlhf_jax.saved import Source, load_source
from rlhf_jax.types import Prompts, PyTree, Sequences

FOLDER = Path(__file__).parent / "golden"
NAMES = tuple(sorted(path.name for path in FOLDER.iterdir() if path.is_dir()))
POLICIES = tuple(name for name in NAMES if not name.endswith("_score"))
REWARDS = tuple(name for name in NAMES if name.endswith("_score"))
TOLERANCE = 2e-4  # of a logit or a score, float32 against float32


@functools.cache
def source(name: str) -> Source:
    """A fixture, opened."""
    return load_source(str(FOLDER / name), "--model")


@functools.cache
def canonical(name: str) -> PyTree:
    """A fixture's parameters, read."""
    return jax.tree.map(np.asarray, source(name).params)


def network(name: str, **changes: Any) -> tuple[ModelConfig, PyTree]:
    """A fixture's configuration with other values, and its parameters in that layout."""
    config = dataclasses.replace(source(name).config, logits_chunk=0, **changes)
    params = jax.tree.map(functools.partial(jnp.asarray, dtype=config.param_dtype), canonical(name))
    return config, layout.to_runtime(params, config.unit)


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    """What transformers computed, and of what."""
    with np.load(FOLDER / name / "expected.npz") as arrays:
        return dict(arrays)


def rows(want: dict[str, np.ndarray]) -> Sequences:
    """The eight rows, [8, T]: two full, two padded on the right, two on the left, two packed."""
    tokens, positions, segments = (jnp.asarray(want[name]) for name in ("tokens", "positions", "segment_ids"))
    return Sequences(tokens=tokens, positions=positions, segment_ids=segments, loss_mask=segments != 0)


def prompts(want: dict[str, np.ndarray]) -> Prompts:
    """The three prompts [3, P], padded on the left."""
    tokens = want["prompts"]
    real = tokens >= 0
    positions = np.maximum(real.cumsum(-1) - 1, 0)
    index = np.arange(len(tokens))
    values = dict(tokens=np.where(real, tokens, 0), positions=positions, segment_ids=real, prompt_ids=index, sample_ids=0 * index, group_ids=index)
    return Prompts(**{key: jnp.asarray(value, jnp.int32) for key, value in values.items()})


def last(segment_ids: np.ndarray) -> np.ndarray:
    """The last slot of every row that is not padding, [B]."""
    return np.array([np.flatnonzero(row)[-1] for row in segment_ids])


def export(folder: Path, config: ModelConfig, params: PyTree, longest: int) -> None:
    """Writes a network as a Hugging Face directory, in float32.

    Args:
      folder: the target.
      config: the network.
      params: its parameters in either layout.
      longest: max_position_embeddings, tokens.
    """
    rows_of = families.load(config.family).ROWS
    write_directory(folder, rows_of, config, layout.to_canonical(params), dtype="float32", config_json=families.write(config, longest))
