"""A family that exists nowhere, with every kind of row a table can have, and its tensors written out by hand beside the table.

Layer 0 is dense, layer 1 has experts; query, key and value are one tensor of theirs; no two sizes are equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf.rows import Row, same, transposed
from rlhf_jax.models.hf.safetensors import Output, write
from rlhf_jax.types import PyTree

CONFIG = ModelConfig(
    vocab_size=11, hidden=6, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=7, context=8, rope_theta=100.0, norm_eps=1e-6, tied=False, dropout=0.0,
    param_dtype="float32", compute_dtype="float32", scan_layers=False, remat="none", logits_chunk=0, experts=3, experts_per_token=2, expert_mlp=5,
    dense=(True, False),
)
CONFIG_JSON = {"model_type": "invented", "architectures": ["InventedForCausalLM"], "hidden_size": 6}


def _split(tensor: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, ...]:
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return tuple(part.T for part in np.split(tensor, [query, query + key]))


ROWS = (
    same("model.embed.weight", "ends/embedding"),
    same("model.layers.{i}.norm1.weight", "layers/{i}/attention_norm/scale"),
    Row(
        "model.layers.{i}.qkv.weight", ("layers/{i}/query/kernel", "layers/{i}/key/kernel", "layers/{i}/value/kernel"), _split,
        lambda parts, _: np.concatenate([part.T for part in parts]),
    ),
    transposed("model.layers.{i}.out.weight", "layers/{i}/output/kernel"),
    same("model.layers.{i}.out.bias", "layers/{i}/output/bias"),  # the network has none
    transposed("model.layers.{i}.up.weight", "layers/{i}/up/kernel"),
    transposed("model.layers.{i}.router.weight", "layers/{i}/router/kernel"),
    transposed("model.layers.{i}.experts.{e}.up.weight", "layers/{i}/experts/up"),
    same("model.norm.weight", "ends/norm/scale"),
    transposed("lm_head.weight", "ends/lm_head"),
)
IGNORED = (r"model\.layers\.\d+\.rotary\.inv_freq",)
SHAPES = {
    "ends/embedding": (11, 6),
    "ends/norm/scale": (6,),
    "ends/lm_head": (6, 11),
    **{f"layers/{i}/attention_norm/scale": (6,) for i in range(2)},
    **{f"layers/{i}/query/kernel": (6, 16) for i in range(2)},
    **{f"layers/{i}/{name}/kernel": (6, 8) for i in range(2) for name in ("key", "value")},
    **{f"layers/{i}/output/kernel": (16, 6) for i in range(2)},
    "layers/0/up/kernel": (6, 7),
    "layers/1/router/kernel": (6, 3),
    "layers/1/experts/up": (3, 6, 5),
}


def params(*, without: tuple[str, ...] = (), **more: tuple[int, ...]) -> PyTree:
    """A canonical tree of float32 arrays; `more` are further shapes, with `__` for `/`."""
    rng = np.random.default_rng(0)
    shapes = SHAPES | {path.replace("__", "/"): shape for path, shape in more.items()}
    drawn = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items() if path not in without}
    return traverse_util.unflatten_dict(drawn, sep="/")


def abstract(tree: PyTree) -> PyTree:
    """The shapes of a tree."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def theirs(tree: PyTree) -> dict[str, np.ndarray]:
    """The tensors of `params()` in the invented layout, without the table."""
    ends, layers = tree["ends"], tree["layers"]
    found = {"model.embed.weight": ends["embedding"], "model.norm.weight": ends["norm"]["scale"]}
    if "lm_head" in ends:
        found["lm_head.weight"] = ends["lm_head"].T
    if "score_head" in ends:
        found["score.weight"] = ends["score_head"]["kernel"].T
    for i, layer in layers.items():
        at = f"model.layers.{i}"
        found[f"{at}.norm1.weight"] = layer["attention_norm"]["scale"]
        found[f"{at}.qkv.weight"] = np.vstack([layer[name]["kernel"].T for name in ("query", "key", "value")])
        found[f"{at}.out.weight"] = layer["output"]["kernel"].T
    found["model.layers.0.up.weight"] = layers["0"]["up"]["kernel"].T
    found["model.layers.1.router.weight"] = layers["1"]["router"]["kernel"].T
    return found | {f"model.layers.1.experts.{e}.up.weight": layers["1"]["experts"]["up"][e].T for e in range(3)}


def write_file(path: Path, tensors: dict[str, Any], dtype: Any = None) -> str:
    """A safetensors file of arrays, in their own dtypes or in one."""
    return write(path, [Output(name, np.dtype(dtype or x.dtype), x.shape, lambda x=x: x) for name, x in tensors.items()])
