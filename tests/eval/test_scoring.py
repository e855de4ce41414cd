"""Scoring rows: padded lengths, how many programs, independence of neighbours, and agreement with the trainer's own reading."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.batches import right_padded
from rlhf_jax.data.mixed import Item
from rlhf_jax.errors import UserError
from rlhf_jax.eval import models, scoring
from rlhf_jax.models import Networks, NetworkSpec
from rlhf_jax.ops import masking
from rlhf_jax.saved import Source
from tests.cli.saved import config, draw
from tests.models.tiny import jit


def _source(network: str = "policy", **changes) -> Source:
    model = config(network, **changes)
    return Source("here", "/here", network, model, draw(model), {}, None, None)


def _items(lengths) -> list[Item]:
    rng = np.random.default_rng(0)
    return [Item(rng.integers(0, 264, length).astype(np.int32), None, "rows.jsonl", i + 1) for i, length in enumerate(lengths)]


def _alone(source: Source, item: Item, temperature: float = 1.0) -> np.ndarray:
    """One row, unpadded, through the networks as a trainer reads it."""
    seqs = right_padded([[(item.tokens, np.ones(len(item.tokens), bool))]], len(item.tokens), None, 0)

    @jit
    def read(params, seqs):
        if source.network == "reward":
            nets = Networks({"reward": params}, {}, NetworkSpec(reward=source.config))
            return masking.at_last_real(nets.reward(seqs).scores, seqs.segment_ids)[0]
        return Networks({"policy": params}, {}, NetworkSpec(policy=source.config, temperature=temperature)).policy(seqs).logps[0]

    return np.asarray(read(source.params, jax.tree.map(jnp.asarray, seqs)))


@pytest.mark.parametrize(("context", "expected"), [(96, (16, 32, 64, 96)), (64, (16, 32, 64)), (16, (16,)), (5, (5,)), (17, (16, 17))])
def test_padded_lengths(context, expected):
    assert scoring.lengths(context) == expected


@pytest.mark.parametrize("network", ["policy", "reward"])
def test_every_row_is_scored_as_alone_and_in_order(network):
    source = _source(network)
    items = _items([5, 96, 1, 5])
    temperature = 1.0 if network == "reward" else 0.7
    scorer = scoring.Scorer(source, "--model", batch_tokens=128, temperature=temperature)
    found = scorer.score(items)
    for item, values in zip(items, found, strict=True):
        wanted = _alone(source, item, temperature)
        assert values.shape == wanted.shape
        np.testing.assert_allclose(values, wanted, atol=2e-5, err_msg=item.place)
    if network == "policy":
        assert all(values[0] == 0 for values in found)


def test_a_file_of_any_lengths_compiles_few_programs(monkeypatch):
    """One per padded length, and for the rest of the window at most a power of two of rows."""
    shapes = set()
    program = models._logps

    def watched(*settings):
        run = program(*settings)
        return lambda params, seqs: (shapes.add(seqs.tokens.shape), run(params, seqs))[1]

    monkeypatch.setattr(models, "_logps", watched)
    items = _items(np.random.default_rng(1).integers(1, 97, 150))
    done = []
    scoring.Scorer(_source(), "--model", batch_tokens=256).score(items, done.append)
    assert sum(done) == 150 and len(done) > 20
    full = {(2, 96), (4, 64), (8, 32), (16, 16)}
    assert len(shapes - full) <= 1 and all(shape[0] in (1, 2, 4, 8) for shape in shapes - full), shapes


def test_logits_are_cut_to_a_bounded_size(monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS", 264 * 10)
    source, items = _source(), _items([30, 7])
    scorer = scoring.Scorer(source, "--model", batch_tokens=64)
    assert scorer._sized(32).config.logits_chunk == 5 and scorer._sized(96).config.logits_chunk == 10
    for item, values in zip(items, scorer.score(items), strict=True):
        np.testing.assert_allclose(values, _alone(source, item), atol=2e-5)


def test_sharded_over_devices_the_scores_are_the_same():
    items = _items([20, 9, 31, 4, 12])
    whole = scoring.Scorer(_source(), "--model", batch_tokens=96).score(items)
    mesh = models.distributed.make_mesh({"fsdp": 2, "tensor": 2}, devices=4)
    split = scoring.Scorer(_source(), "--model", batch_tokens=96, mesh=mesh).score(items)
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_windows_hold_every_row_once():
    items = _items([10] * 100)
    portions = list(scoring.windows(items, batch_tokens=2))
    assert [item for portion in portions for item in portion] == items
    assert [len(portion) for portion in portions] == [13] * 7 + [9]
    assert list(scoring.windows([], 2)) == []


def test_a_number_that_is_not_finite_is_a_mistake_with_its_place():
    source = _source()
    source.params["ends"]["norm"]["scale"][0] = np.nan
    with pytest.raises(UserError, match=r"rows\.jsonl:1 has a log-prob that is not finite"):
        scoring.Scorer(source, "--model", batch_tokens=64).score(_items([5]))


def test_progress_speaks_now_and_then(monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(scoring.time, "monotonic", lambda: next(clock))
    said = []
    progress = scoring.Progress(100, said.append)
    for rows in (10, 10, 10, 70):
        progress(rows)
    assert said == ["20 of 100 rows scored, about 44 s left"]
