"""Writes our own vectors, one JSON file per objective: `python -m tests.conformance.publish [--out DIR]`.

Framework-neutral: a policy is a table of logits indexed by the token before, so any program can rebuild the networks in two lines; README.md
beside the files says how. A case holds the tables when the batch was prepared (`old`), the tables at which the loss is taken (`at`), the batch,
and what comes out: the loss, its terms, its gradients, the metrics and the objective's own state.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import objectives
from rlhf_jax.objectives import _catalogue
from rlhf_jax.types import Comparisons, Labelled, Mean, Rollout, Sequences, Unpaired
from tests.objectives import tabular
from tests.objectives.settings import CONFIGS, V, bound, moved, random_batch

FOLDER = pathlib.Path(__file__).parent / "vectors" / "rlhf_jax"
TYPES = {kind.__name__: kind for kind in (Sequences, Comparisons, Unpaired, Labelled, Rollout)}
CASES = {"four rows": {"rows": 4, "length": 7, "filler": False}, "six rows, the last one filler": {"rows": 6, "length": 6, "filler": True}}


def plain(tree: Any) -> Any:
    """Dataclasses, dicts and arrays as JSON values: floats with the nine digits that tell float32 numbers apart, None left out."""
    if dataclasses.is_dataclass(tree):
        return plain({f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)})
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items() if value is not None}
    values = np.asarray(tree)
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: float(f"{float(text):.9g}"))


def rebuilt(kind: type, values: Mapping[str, Any]) -> Any:
    """A batch of `kind` from its JSON values."""
    integer, truth = ("tokens", "positions", "segment_ids", "loss_positions", "group_ids", "prompt_ids", "sample_ids", "version"), (
        "loss_mask", "truncated", "desirable")
    leaves = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            leaves[name] = rebuilt(Sequences, value)
        else:
            leaves[name] = jnp.asarray(value, jnp.int32 if name in integer else bool if name in truth else jnp.float32)
    return kind(**leaves)


def outcome(name: str, old: tabular.TabularNets, at: tabular.TabularNets, batch: Any) -> dict[str, Any]:
    """What the objective makes of a batch without reference log-probs: loss, terms, gradients, metrics, carry.

    Args:
      name: the objective.
      old: the networks when the batch is prepared.
      at: the networks at which the loss is taken.
      batch: as the data pipeline or the sampler hands it over.
    """
    return _outcome(bound(name), old, at, tabular.with_reference(old, batch))


@functools.partial(jax.jit, static_argnums=0)
def _outcome(chosen: objectives.Objective, old: tabular.TabularNets, at: tabular.TabularNets, batch: Any) -> dict[str, Any]:
    """One program per objective and shape."""
    prepared, carry, before = chosen.prepare(old, batch, chosen.init_carry(old), jax.random.key(0))

    def loss(params: Any) -> tuple[Any, Any]:
        terms, metrics = chosen.loss(at.replace(params=params), prepared, None)
        return tabular.value(terms), (terms, {**before, **metrics})

    (value, (terms, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(at.params)
    means = lambda found: {key: mean.compute() for key, mean in sorted(found.items())}  # noqa: E731
    return {"loss": value, "terms": means(terms), "gradients": gradients, "metrics": means(metrics), "carry": carry}


def document(name: str) -> dict[str, Any]:
    """The JSON of an objective."""
    entry, cases = _catalogue.entry(name), []
    for number, (what, shape) in enumerate(CASES.items()):
        rng = np.random.default_rng(1000 + number)
        old = tabular.nets(rng, V)
        batch = random_batch(entry.batch_type, rng, packed=False, **shape)
        at = moved(old, rng)
        cases.append({
            "name": what, "reference": plain(old.frozen["ref"]), "old": plain(old.params), "at": plain(at.params), "batch": plain(batch),
            "outcome": _plain_tree(outcome(name, old, at, batch)),
        })
    return {"objective": name, "title": entry.title, "equation": entry.equation.splitlines(), "paper": entry.see, "deviation": entry.deviation,
            "hyperparameters": {key: value for key, value in CONFIGS[name].items() if key != "name"}, "batch": entry.batch_type.__name__,
            "cases": cases}


def _plain_tree(tree: Any) -> Any:
    return plain(jax.tree.map(np.asarray, tree, is_leaf=lambda x: isinstance(x, Mean)))


def main(arguments: list[str] | None = None) -> None:
    """Writes every objective's file."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.publish", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    folder = parser.parse_args(arguments).out
    folder.mkdir(parents=True, exist_ok=True)
    for name in objectives.names():
        text = json.dumps(document(name), ensure_ascii=False, allow_nan=True)
        (folder / f"{name}.json").write_text(text.replace("}, {", "},\n{") + "\n", encoding="utf-8")
        print(folder / f"{name}.json")


if __name__ == "__main__":
    main()
