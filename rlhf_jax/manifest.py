"""A state as leaves by path, and the digests that prove two states equal. No Orbax, no disk: `checkpoint.py` writes what this describes.

Paths are key-path segments, escaped and joined with '/', so that they are unique, JSON-safe and turn back into nested dicts. A leaf's
digest is the SHA-256 of its dtype, shape and bytes; typed PRNG keys count by their words. The manifest lists every leaf of every item
and carries a digest of itself, which tells a damaged manifest from a checkpoint of another model.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from rlhf_jax.types import PyTree

Leaves = dict[str, Any]


def tree_digest(tree: PyTree) -> dict[str, str]:
    """SHA-256 over dtype, shape and bytes of every leaf, by path. Typed keys are supported.

    A leaf whose shards this process cannot see is gathered, so that in a multi-host run every process must call this.
    """
    return {path: str(digest) for path, digest in digests(flatten(tree)[0], gather=True).items()}


def state_hash(tree: PyTree) -> str:
    """One hex digest over all leaves in path order: equal if and only if two states are bit-identical. See `tree_digest`."""
    lines = "".join(f"{path} {digest}\n" for path, digest in sorted(tree_digest(tree).items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def flatten(tree: PyTree) -> tuple[Leaves, dict[str, str]]:
    """A tree as arrays by path.

    Returns:
      (leaves in tree order; "none" or "dict" for each `None` and empty dict). NumPy and Python scalars become arrays, Python's with
      the dtype they would have under jit.

    Raises:
      ValueError: two keys of one dict have the same text, e.g. 1 and "1".
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None or (isinstance(x, dict) and not x))
    leaves: Leaves = {}
    empty: dict[str, str] = {}
    for entries, leaf in pairs:
        path = "/".join(_escape(jax.tree_util.keystr((entry,), simple=True)) for entry in entries) or "~"
        if path in leaves or path in empty:
            raise ValueError(f"two leaves of the tree share the path {path!r}: rename one of the keys")
        if leaf is None or isinstance(leaf, dict):
            empty[path] = "none" if leaf is None else "dict"
        elif hasattr(leaf, "dtype"):
            leaves[path] = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
        else:
            array = np.asarray(leaf)
            leaves[path] = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
    return leaves, empty


def nest(flat: Mapping[str, Any], name: Callable[[str], str] = str) -> dict[str, Any]:
    """Leaves by path as nested dicts; `name` maps each path segment to a dict key."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = (name(segment) for segment in path.split("/"))
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def unnest(nested: Mapping[str, Any], prefix: str = "") -> Leaves:
    """The inverse of `nest`."""
    flat: Leaves = {}
    for segment, node in nested.items():
        flat |= unnest(node, f"{prefix}{segment}/") if isinstance(node, dict) else {f"{prefix}{segment}": node}
    return flat


def _escape(segment: str) -> str:
    # Orbax joins the segments with dots: unescaped, "a.b" and "a" → "b" would overwrite each other on disk, silently.
    return segment.replace("~", "~0").replace("/", "~1").replace(".", "~2")


def unescape(segment: str) -> str:
    """The dict key that a path segment stands for."""
    return segment.replace("~2", ".").replace("~1", "/").replace("~0", "~")


def is_key(leaf: Any) -> bool:
    """Whether a leaf, abstract or not, is an array of typed PRNG keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def words(leaf: Any) -> Any:
    """A typed key's uint32 words; every other array as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def build(step: int, flat: Mapping[str, tuple[Leaves, dict[str, str]]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON manifest of a step: {step, meta, items: {name: {leaves: {path: {dtype, shape, sha256, impl?}}, empty}}, sha256}.

    Args:
      step: the step's number.
      flat: each item, flattened.
      meta: the caller's own, JSON-serializable.
    """
    items = {}
    for name, (leaves, empty) in flat.items():
        hashes = digests(leaves)
        records = {path: {"dtype": str(x.dtype), "shape": list(x.shape), "sha256": hashes[path]} for path, x in leaves.items()}
        for path, leaf in leaves.items():
            if is_key(leaf):
                records[path]["impl"] = str(jax.random.key_impl(leaf))
        items[name] = {"leaves": records, "empty": empty}
        unchecked = sum(digest is None for digest in hashes.values())
        if unchecked:
            logging.log_first_n(logging.WARNING, "checkpoint: %d leaves of %r span hosts and carry no digest", 1, unchecked, name)
    body = json.loads(json.dumps({"step": step, "meta": meta, "items": items}))  # as it will be read back
    return body | {"sha256": text_digest(body)}


def check(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without its digest.

    Raises:
      ValueError: it is not what `build` made.
    """
    if not isinstance(manifest, dict) or "sha256" not in manifest:
        raise ValueError("it is not a manifest")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if text_digest(body) != manifest["sha256"]:
        raise ValueError("it differs from what was saved")
    return body


def text_digest(body: Mapping[str, Any]) -> str:
    """Hex digest of a manifest; since it lists every leaf's, of the whole step."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def differences(saved: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any], name: str) -> list[str]:
    """One phrase per leaf that is missing, extra, or of another shape or dtype.

    Args:
      saved: the manifest's leaf records of item `name`.
      wanted: leaves by path, abstract or not.
      name: the item, for the phrases.
    """
    found = []
    for path in sorted(saved.keys() | wanted.keys()):
        label = f"{name}/{path}"
        if path not in saved:
            found.append(f"{label} is missing from the checkpoint")
        elif path not in wanted:
            found.append(f"{label} is only in the checkpoint")
        else:
            old, new = saved[path], wanted[path]
            if tuple(old["shape"]) != tuple(new.shape):
                found.append(f"{label} has shape {tuple(old['shape'])} in the checkpoint and {tuple(new.shape)} here")
            if old["dtype"] != str(new.dtype):
                found.append(f"{label} is {old['dtype']} in the checkpoint and {new.dtype} here")
    return found


def digests(leaves: Mapping[str, Any], *, gather: bool = False) -> dict[str, str | None]:
    """SHA-256 per leaf; None for one whose shards this process cannot see, unless `gather`, a collective."""
    if gather and jax.process_count() > 1:  # collectives run in one order on every process
        return {path: _digest(leaf, gather=True) for path, leaf in leaves.items()}
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        return dict(zip(leaves, pool.map(_digest, leaves.values())))


def _digest(leaf: Any, *, gather: bool = False) -> str | None:
    values = _on_host(words(leaf), gather=gather)
    if values is None:
        return None
    sha = hashlib.sha256(f"{leaf.dtype}{list(leaf.shape)}".encode())
    sha.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def _on_host(array: Any, *, gather: bool) -> np.ndarray | None:
    """Its values, read shard by shard: `np.asarray(array)` would cache a copy in the array and, on CPU, pin a buffer to be donated."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if array.is_fully_replicated:
        return jax.device_get(array.addressable_shards[0].data)
    if not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True)) if gather else None
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = jax.device_get(shard.data)
    return whole
