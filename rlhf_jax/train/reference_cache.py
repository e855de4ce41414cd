"""Writes the reference's log-probs of a run's rows, so that `config.reference_from` may name them in place of the network.

The run's own data sets are read in the batches that it would train on, unpacked and not shuffled, and the reference reads them as in a train step: at
the run's precision, at the tokens that are trained on. So training with the cache is training with the network, to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data import references
from rlhf_jax.data.prepare import Prepared
from rlhf_jax.errors import UserError
from rlhf_jax.eval.models import Policy
from rlhf_jax.eval.scoring import Progress
from rlhf_jax.models.config import RUNTIME
from rlhf_jax.saved import Source
from rlhf_jax.train.assemble import datasets, text_side
from rlhf_jax.types import Sequences


def write_references(
    config: Mapping[str, Any], source: Source, key: str, folder: Path, mesh: Mesh | None, say: Callable[[str], None]
) -> dict[str, int]:
    """Writes the log-probs of config.data.train and config.data.valid.

    Args:
      config: checked (train.config.check).
      source: the reference.
      key: the flag that named it, for messages.
      folder: an empty one.
      mesh: where the reference lies; None takes one device.
      say: gets a line now and then.

    Returns:
      Tokens by set, "train" and "valid".

    Raises:
      UserError: rows that cannot have cached log-probs, or a reference that reads them otherwise than the run.
    """
    references.check_kind(config["data"]["kind"], "--config")
    _, tokenizer, template = text_side(config)
    if not source.reader(key).reads_like(tokenizer):
        raise UserError(f"{key} = {source.path!r} reads another tokenizer than the run of --config")
    unpacked = {**config, "data": {**config["data"], "pack": False}}
    sets = dict(zip(("train", "valid"), datasets(unpacked, tokenizer, template)))
    chosen = {name: config["model"][name] for name in RUNTIME if name not in ("context", "dropout", "scan_layers")}
    policy = Policy(dataclasses.replace(source, config=dataclasses.replace(source.config, **chosen)), key, mesh)
    counts = {}
    for name, one in sets.items():
        if one is not None:
            counts[name] = references.write(folder, one.prepared, _rows(policy, one, say))
    references.finish(folder, {"reference": source.origin, "tokens": counts, "compute_dtype": chosen["compute_dtype"]})
    return counts


def _rows(policy: Policy, dataset: Any, say: Callable[[str], None]) -> Iterator[np.ndarray]:
    """Every row's log-probs in the order of the set."""
    prepared: Prepared = dataset.prepared
    progress, index = Progress(len(prepared), say), 0
    for batch in dataset.eval_batches():
        seqs: Sequences = batch if isinstance(batch, Sequences) else batch.seqs
        found = np.asarray(policy.logps(seqs, temperature=1.0), np.float32)
        found = found.reshape(len(found), -1, found.shape[-1])
        for row in found[: len(prepared) - index]:
            yield np.concatenate([branch[:length] for branch, length in zip(row, prepared.lengths[index])])
            index += 1
        progress(min(len(found), len(prepared) - progress.done))
