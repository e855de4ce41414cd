"""What must hold for every objective: the form of its module, microbatch invariance, and indifference to padding and filler."""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.types import Mean, Rollout, Sequences
from tests.objectives import tabular
from tests.objectives.settings import CONFIGS, V, case, random_batch

NAMES = sorted(CONFIGS)


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_every_built_in_objective_is_tested_here():
    assert objectives.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_module_cites_its_paper_and_has_no_defaults(name):
    module = objectives.load(name)
    for label in ("Use: ", "See: ", "Deviation: "):
        assert f"\n{label}" in module.__doc__, label
    assert module.DEFAULTS.keys() == dict(objectives.bind(CONFIGS[name]).hyperparameters).keys()
    for function in vars(module).values():
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            assert all(p.default is p.empty for p in inspect.signature(function).parameters.values()), function
            assert function.__name__ in objectives.POSITIONAL or "Args:" in function.__doc__, function


@pytest.mark.parametrize("name", NAMES)
def test_what_ranges_and_needs_speak_of_is_there_and_every_string_has_its_names(name):
    module = objectives.load(name)
    ranges = getattr(module, "RANGES", {})
    assert ranges.keys() <= module.DEFAULTS.keys() >= set(getattr(module, "NEEDS", {}).values()) - {""}
    for key, default in module.DEFAULTS.items():
        if isinstance(default, str):
            assert default in ranges[key], key
            for legal in ranges[key]:
                assert objectives.bind({**CONFIGS[name], key: legal}).hyperparameters[key] == legal


@pytest.mark.parametrize("name", NAMES)
def test_terms_and_metrics_are_means_and_counts_ignore_the_parameters(name):
    bound, fake, batch = case(name)
    terms, metrics = tabular.loss(bound, fake, batch)
    assert terms and all(isinstance(m, Mean) and m.total.shape == m.count.shape == () for m in (terms | metrics).values())
    assert not terms.keys() & metrics.keys()
    elsewhere, _ = tabular.loss(bound, fake.replace(params=jax.tree.map(lambda x: 3 * x + 1, fake.params)), batch)
    close({k: m.count for k, m in terms.items()}, {k: m.count for k, m in elsewhere.items()}, rtol=0, atol=0)
    slopes = jax.jit(jax.grad(lambda p: sum(m.count for m in bound.loss(fake.replace(params=p), batch, None)[0].values())))(fake.params)
    close(slopes, jax.tree.map(jnp.zeros_like, slopes), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_microbatches_merge_to_the_whole(name, parts):
    bound, fake, batch = case(name)

    def split(params):
        pieces = [jax.tree.map(lambda x, i=i: x[i::parts], batch) for i in range(parts)]
        results = [bound.loss(fake.replace(params=params), piece, None) for piece in pieces]
        merged = jax.tree.map(lambda *x: sum(x), *results)
        return tabular.value(merged[0]), merged[1]

    (value, metrics), gradient = jax.jit(jax.value_and_grad(split, has_aux=True))(fake.params)
    close((value, gradient), tabular.objective(bound, fake, batch))
    close(metrics, tabular.loss(bound, fake, batch)[1])


def scrambled(batch, seed=7):
    """Other tokens on the padding, and rubbish in every array of the filler row."""
    rng = np.random.default_rng(seed)

    def seqs(s: Sequences) -> Sequences:
        noise = jnp.asarray(rng.integers(0, V, s.tokens.shape), jnp.int32)
        return s.replace(tokens=jnp.where(s.segment_ids == 0, noise, s.tokens))

    if isinstance(batch, Sequences):
        return seqs(batch)
    spoil = {f.name: getattr(batch, f.name).at[-1].set(1e6) for f in dataclasses.fields(batch)
             if f.name in ("scores", "margin", "targets") and getattr(batch, f.name) is not None}
    return batch.replace(seqs=seqs(batch.seqs), **spoil)


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_filler_rows_hold_nothing_that_counts(name):
    rng = np.random.default_rng(3)
    bound, fake, _ = case(name)
    clean = tabular.with_reference(fake, random_batch(bound.batch_type, rng, rows=8, packed=False))
    if isinstance(clean, Rollout):  # a whole group of filler, which can be taken away
        filler = jnp.arange(8) >= 6
        hidden = lambda seqs: seqs.replace(segment_ids=jnp.where(filler[:, None], 0, seqs.segment_ids))  # noqa: E731
        clean = clean.replace(seqs=hidden(clean.seqs), ptx=hidden(clean.ptx))
    fewer = jax.tree.map(lambda x: x[:6 if isinstance(clean, Rollout) else 7], clean)  # the filler rows taken away
    results = [tabular.outcome(bound, fake, batch) for batch in (clean, scrambled(clean), fewer)]
    close(results[0], results[1])
    close(results[0], results[2])


@pytest.mark.parametrize("name", NAMES)
def test_more_padding_on_either_side_changes_nothing(name):
    """Masked = filtered: the same rows with two slots of padding before them and one after, holding random tokens."""
    bound, fake, _ = case(name)
    rng, length = np.random.default_rng(4), 8
    narrow = random_batch(bound.batch_type, rng, length=length, packed=False)
    wide = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(2, 1)]) if x.shape[-1] == length else x, narrow)
    close(*(tabular.outcome(bound, fake, tabular.with_reference(fake, batch)) for batch in (narrow, scrambled(wide))))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_filler_alone_gives_zero_and_a_zero_gradient(name):
    bound, fake, _ = case(name)
    batch = tabular.with_reference(fake, random_batch(bound.batch_type, np.random.default_rng(0), packed=False))
    empty = lambda seqs: seqs.replace(segment_ids=jnp.zeros_like(seqs.segment_ids))  # noqa: E731
    found = {} if isinstance(batch, Sequences) else {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    batch = batch.replace(**{key: empty(s) for key, s in found.items() if isinstance(s, Sequences)}) if found else empty(batch)
    got = tabular.outcome(bound, fake, batch)
    metrics, gradient = got["prepared"], got["gradient"]
    assert float(got["value"]) == 0.0
    close(gradient, jax.tree.map(jnp.zeros_like, gradient), rtol=0, atol=0)
    assert all(np.isfinite(m.compute()) for m in metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_log_ratios_of_fifty_nats_stay_finite(name):
    bound, fake, batch = case(name)
    for shift in (-50.0, 50.0):
        far = {k: v.at[..., 1].add(shift) for k, v in fake.params.items()}
        value, gradient = tabular.objective(bound, fake.replace(params=far), batch)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "ppo"])
def test_the_head_on_loss_positions_only_changes_nothing(name):
    bound, fake, batch = case(name)
    seqs = batch if isinstance(batch, Sequences) else batch.seqs
    loss_mask, length = np.asarray(seqs.loss_mask), seqs.tokens.shape[-1]
    positions = np.zeros(loss_mask.shape, np.int32)
    for index in np.ndindex(*loss_mask.shape[:-1]):
        own = np.flatnonzero(loss_mask[index])
        positions[index][: len(own)] = own
    assert positions.shape[-1] == length
    seqs = seqs.replace(loss_positions=jnp.asarray(positions))
    sparse = seqs if isinstance(batch, Sequences) else batch.replace(seqs=seqs)
    close(tabular.objective(bound, fake, batch), tabular.objective(bound, fake, sparse))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inputs_stay_finite(name):
    bound, fake, _ = case(name)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), fake)
    batch = tabular.with_reference(half, random_batch(bound.batch_type, np.random.default_rng(0), packed=False))
    batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, batch)
    got = tabular.outcome(bound, half, batch)
    assert np.isfinite(got["value"]) and all(np.isfinite(g.astype(jnp.float32)).all() for g in jax.tree.leaves(got["gradient"]))


def test_a_pair_objective_refuses_other_numbers_of_branches():
    rng = np.random.default_rng(0)
    for name in ("dpo", "reward"):
        bound, fake, batch = case(name)
        three = batch.replace(seqs=tabular.with_reference(fake, tabular.sequences(rng, (6, 3, 8), V)))
        with pytest.raises(AssertionError):
            bound.loss(fake, three, None)
