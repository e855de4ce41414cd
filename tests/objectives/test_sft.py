"""SFT and LM: values and gradients, which tokens count, an overfit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.objectives import sft
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.types import Sequences
from tests.objectives import tabular
from tests.reference import objectives as slow
from tests.reference.numeric import gradient

V = 4


def bound(name, **changes):
    return objectives.bind({"name": name, "label_smoothing": 0.0, "z_loss": 0.0, **changes})


@pytest.mark.parametrize("name", ["sft", "lm"])
@pytest.mark.parametrize("label_smoothing, z_loss", [(0.0, 0.0), (0.2, 0.0), (0.0, 0.1)])
def test_value_and_gradient(name, label_smoothing, z_loss):
    rng = np.random.default_rng(0)
    fake, batch = tabular.nets(rng, V), tabular.sequences(rng, (4, 7), V, filler=True, packed=True)
    tables, _ = tabular.float64(fake)
    seqs = tabular.as_numpy(batch)
    if name == "lm":
        seqs = seqs.replace(loss_mask=np.ones_like(seqs.loss_mask))
    value, slopes = tabular.objective(bound(name, label_smoothing=label_smoothing, z_loss=z_loss), fake, batch)
    by_hand = functools.partial(slow.sft, seqs=seqs, z_loss=z_loss, label_smoothing=label_smoothing)
    np.testing.assert_allclose(value, by_hand(tables["policy"]), rtol=1e-5)
    np.testing.assert_allclose(slopes["policy"], gradient(by_hand, tables["policy"]), rtol=1e-3, atol=1e-5)


def test_a_uniform_policy_costs_log_v_per_response_token_and_the_prompt_costs_nothing():
    tokens = jnp.array([[0, 1, 2, 3, 0]], jnp.int32)
    batch = Sequences(tokens=tokens, positions=jnp.arange(5)[None], segment_ids=jnp.array([[1, 1, 1, 1, 0]]),
                      loss_mask=jnp.array([[False, False, True, True, True]]))
    fake = tabular.TabularNets({"policy": jnp.zeros((V, V))}, {})
    terms, metrics = tabular.loss(bound("sft"), fake, batch)
    assert metrics == {} and set(terms) == {"nll"} and float(terms["nll"].count) == 2
    np.testing.assert_allclose(terms["nll"].compute(), np.log(V), rtol=1e-6)
    terms, _ = tabular.loss(bound("lm", z_loss=0.5), fake, batch)
    assert float(terms["nll"].count) == 3  # every token but the first and the padding
    np.testing.assert_allclose(terms["z_loss"].compute(), 0.5 * np.log(V) ** 2, rtol=1e-6)


def test_packed_is_unpacked():
    rng = np.random.default_rng(5)
    fake, chosen = tabular.nets(rng, V), bound("sft", z_loss=0.01)
    rows = tabular.sequences(rng, (2, 8), V)
    apart = jax.tree.map(lambda x: x, rows)
    together = rows.replace(segment_ids=rows.segment_ids * jnp.array([[1], [2]]))
    together = jax.tree.map(lambda x: x.reshape(1, -1), together)
    a, b = tabular.objective(chosen, fake, apart), tabular.objective(chosen, fake, together)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b)


def test_overfit_the_likelihood_rises():
    rng = np.random.default_rng(1)
    fake, chosen = tabular.nets(rng, V), bound("sft")
    batch = tabular.sequences(rng, (1, 8), V).replace(tokens=jnp.array([[0, 1, 2, 3, 0, 1, 2, 3]], jnp.int32))
    batch = batch.replace(segment_ids=jnp.ones_like(batch.segment_ids), loss_mask=jnp.ones_like(batch.loss_mask))
    before, _ = tabular.objective(chosen, fake, batch)
    trained = tabular.descend(chosen, fake, batch, steps=200, rate=2.0)
    after, _ = tabular.objective(chosen, trained, batch)
    assert before > 1.0 and after < 0.05
    assert jnp.exp(trained.policy(batch).logps)[loss_tokens(batch)].min() > 0.9


def test_wrong_shapes_are_refused():
    for f in (sft.nll_loss, lambda x: sft.z_loss_term(x, z_loss=0.1)):
        with pytest.raises(AssertionError):
            f(jnp.ones(3))
