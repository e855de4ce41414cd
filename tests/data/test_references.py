"""Cached reference log-probs: every batch carries those of its own rows, and those of other rows are refused."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from rlhf_jax import data
from rlhf_jax.data import references
from rlhf_jax.data.prepare import branches
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

KINDS = {
    "preference": [{"prompt": f"q{i}", "chosen": "c" * (i + 1), "rejected": "r" * (5 - i)} for i in range(4)],
    "ranking": [{"prompt": f"q{i}", "responses": [f"{i}a", f"{i}bb", f"{i}ccc"][: 2 + i % 2]} for i in range(4)],
    "demo": [{"prompt": f"q{i}", "completion": "a" * (i + 1)} for i in range(5)],
    "rating": [{"prompt": f"q{i}", "completion": "a" * (i + 1), "score": 0.5} for i in range(3)],
}


def _open(kind: str, rows: str, folder: pathlib.Path, **options):
    return data.open_dataset(kind, rows, Tokenizer.byte_level(), max_length=32, cache=folder / "cache", **{"batch_size": 2} | options)


def _by_token(tokens: np.ndarray) -> np.ndarray:
    """A made-up log-prob, a function of the token and its place."""
    return (-0.01 * tokens - np.arange(tokens.shape[-1])).astype(np.float32)


def _cache(folder: pathlib.Path, dataset) -> str:
    folder.mkdir()
    prepared = dataset.prepared
    rows = (np.concatenate([_by_token(tokens) for tokens, _ in branches(prepared[i])]) for i in range(len(prepared)))
    assert references.write(folder, prepared, rows) == prepared.lengths.sum()
    references.finish(folder, {"model": "made up"})
    return str(folder)


@pytest.mark.parametrize(("kind", "pack"), [("preference", False), ("ranking", False), ("rating", False), ("demo", False), ("demo", True)])
def test_every_batch_carries_its_rows_log_probs(kind, pack, tmp_path, jsonl):
    path = jsonl(KINDS[kind])
    folder = _cache(tmp_path / "ref", _open(kind, path, tmp_path))
    dataset, bare = (_open(kind, path, tmp_path, pack=pack) for _ in range(2))
    references.attach(dataset.prepared, folder, "config.reference_from", "config.data.train")
    batches = [dataset.batch(index, seed=3) for index in range(5)] + list(dataset.eval_batches())
    others = [bare.batch(index, seed=3) for index in range(5)] + list(bare.eval_batches())
    for batch, other in zip(batches, others, strict=True):
        seqs, plain = (getattr(one, "seqs", one) for one in (batch, other))
        assert plain.ref_logps is None and (seqs.tokens == plain.tokens).all()
        place = seqs.positions
        wanted = np.where(seqs.segment_ids != 0, (-0.01 * seqs.tokens - place).astype(np.float32), 0.0)
        np.testing.assert_allclose(seqs.ref_logps, wanted, rtol=1e-6)
        assert seqs.ref_logps.dtype == np.float32


def test_log_probs_of_other_rows_are_refused(tmp_path, jsonl):
    path = jsonl(KINDS["preference"])
    dataset = _open("preference", path, tmp_path)
    folder = _cache(tmp_path / "ref", dataset)
    assert references.is_references(folder) and not references.is_references(tmp_path)
    other = _open("preference", path, tmp_path, overlong="skip")
    with pytest.raises(UserError, match=r"config.reference_from = .* holds no log-probs for the rows of config.data.valid"):
        references.attach(other.prepared, folder, "config.reference_from", "config.data.valid")
    np.save(pathlib.Path(folder) / f"{dataset.prepared.digest}.npy", np.zeros(3, np.float32))
    with pytest.raises(UserError, match=r"holds \(3,\) of float32 and not \d+ log-probs: write it again"):
        references.attach(dataset.prepared, folder, "config.reference_from", "config.data.train")


def test_kinds_that_make_rows_of_their_own_are_refused(tmp_path, jsonl):
    path = jsonl([{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}])
    with pytest.raises(UserError, match="not cached for rows of kind 'feedback'"):
        references.attach(_open("feedback", path, tmp_path).prepared, str(tmp_path), "config.reference_from", "config.data.train")


def test_as_many_as_tokens(tmp_path, jsonl):
    prepared = _open("demo", jsonl(KINDS["demo"]), tmp_path).prepared
    with pytest.raises(ValueError, match="1 log-probs for"):
        references.write(tmp_path, prepared, [np.zeros(1, np.float32)])
