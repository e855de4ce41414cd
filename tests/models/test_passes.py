"""A pass that `prepare` and `loss` share gives what two passes give, gradients included, for the batch's own parameters and rows alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import Networks, NetworkSpec
from rlhf_jax.models.passes import Passes
from tests.models import tiny
from tests.models.test_prefix import rollout

CRITIC = tiny.config(outputs=("value",), layers=3)
SPEC = NetworkSpec(policy=tiny.config(), critic=CRITIC, temperature=0.7)
PARAMS = {"policy": tiny.params(), "critic": tiny.params(CRITIC, seed=1)}


def nets(shared: bool, params=PARAMS) -> Networks:
    return Networks(params, {}, SPEC, passes=Passes(params) if shared else None)


def update(nets: Networks, seqs):
    """Values and log-probs held fixed, and the gradient of a loss that compares the new ones with them and with constants."""
    before = nets.policy(seqs, want=("values", *_logps()))

    def loss(params):
        passes = None if nets.passes is None else nets.passes.within(params)
        now = nets.replace(params=params, passes=passes).policy(seqs, want=("values", *_logps()))
        ratio = jnp.exp(now.logps - before.logps)
        weight = jnp.cumsum(jnp.where(seqs.loss_mask, 1.0, 0.0), -1)
        return jnp.where(seqs.loss_mask, ratio * weight + (now.values - before.values + weight) ** 2, 0.0).sum()

    return before.values, jax.value_and_grad(loss)(nets.params)


def _logps():
    from rlhf_jax.ops import vocab

    return (vocab.logps,)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_values_and_gradients(remat: str) -> None:
    seqs = rollout()
    spec = NetworkSpec(policy=tiny.config(remat=remat), critic=tiny.config(outputs=("value",), layers=3, remat=remat), temperature=0.7)
    found, wanted = (tiny.jit(lambda p, s, shared=shared: update(nets(shared, p).replace(spec=spec), s))(PARAMS, seqs) for shared in (True, False))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_it_is_one_pass() -> None:
    """Counted in the compiled program: what is saved is a trunk's forward pass of each network."""
    wide = dict(hidden=64, heads=4, head_dim=16, kv_heads=4, mlp=256)
    spec = NetworkSpec(policy=tiny.config(**wide), critic=tiny.config(**wide, outputs=("value",)))
    params = {"policy": tiny.params(spec.policy), "critic": tiny.params(spec.critic)}
    seqs = rollout()

    def operations(fn) -> float:
        return tiny.jit(fn).lower(params, seqs).compile().cost_analysis()["flops"]

    once, twice = (operations(lambda p, s, shared=shared: update(nets(shared, p).replace(spec=spec), s)) for shared in (True, False))
    forward = operations(lambda p, s: Networks(p, {}, spec).policy(s, want=("values", "hidden")).__dict__)
    assert twice - once > 0.9 * forward


@pytest.mark.slow
def test_other_parameters_and_other_rows_are_read_for_themselves() -> None:
    """A moving reference in the policy's place, and rows with equal tokens in another array."""
    seqs = rollout()
    moved = {**PARAMS, "policy": tiny.params(seed=7)}
    whole = nets(True)
    first = whole.policy(seqs).logps
    np.testing.assert_array_equal(whole.replace(params=moved).policy(seqs).logps, nets(False, moved).policy(seqs).logps)
    blank = seqs.replace(tokens=jnp.array(seqs.tokens), segment_ids=seqs.segment_ids.at[0].set(0), prefix=None)
    np.testing.assert_array_equal(whole.policy(blank).logps, nets(False).policy(blank).logps)
    assert (np.asarray(whole.policy(blank).logps[0]) == 0).all() and (np.asarray(first[0]) != 0).any()
