"""Saved networks as `rlhf-jax train` leaves them, drawn instead of trained: what the commands that open one are tested on."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

from rlhf_jax import checkpoint
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import ModelConfig, layout, transformer
from rlhf_jax.types import PyTree

GOLDEN = pathlib.Path(__file__).parents[1] / "models" / "families" / "golden"  # Hugging Face directories


def config(network: str = "policy", **changes: Any) -> ModelConfig:
    """A network of one layer that reads bytes."""
    values: dict[str, Any] = dict(
        vocab_size=264, hidden=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=32, context=96, rope_theta=1e4, norm_eps=1e-6, tied=False,
        dropout=0.0, param_dtype="float32", compute_dtype="float32", scan_layers=False, remat="none", logits_chunk=0,
        outputs=("score",) if network == "reward" else ("lm",),
    )
    return ModelConfig(**values | changes)


def draw(model: ModelConfig, seed: int = 0) -> PyTree:
    """Parameters with no leaf at its neutral value; canonical."""
    rng = np.random.default_rng(seed)
    fresh = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    noise = lambda x: (rng.normal(size=x.shape) * (x.shape[0] ** -0.5 if x.ndim > 1 else 1.0)).astype(x.dtype)  # noqa: E731
    return layout.to_canonical(jax.tree.map(noise, fresh))


def write_run(
    folder: pathlib.Path, model: ModelConfig, *, seed: int = 0, step: int = 3, tokenizer: Tokenizer | None = None, params: PyTree = None,
    base: str | None = None, reads_text: bool = True,
) -> pathlib.Path:
    """A workdir with one checkpoint; `params`, else drawn ones, on `base` if they are adapters. Returns `folder`."""
    network = "reward" if "score" in model.outputs else "policy"
    tokenizer = tokenizer or Tokenizer.byte_level()
    meta = {"network": network, "model": model.to_json(), "step": step, "tokenizer": tokenizer.digest, "control_tokens": tokenizer.control_tokens}
    with checkpoint.Checkpointer(folder / checkpoint.CHECKPOINTS, every=0, keep=1) as saver:
        items = {checkpoint.PARAMS: {network: draw(model, seed) if params is None else params}}
        saver.save(step, items, meta | ({} if base is None else {"base": base}), force=True)
    if reads_text:
        tokenizer.save(folder / "tokenizer.json")
        (folder / "template.jinja").write_text(ChatTemplate.load("plain").source)
    (folder / "config.json").write_text("{}\n")
    return folder
