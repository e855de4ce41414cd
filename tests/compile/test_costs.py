"""Counted operations: by hand, and against XLA's own count on programs without loops, of one layer and of two."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.compile import costs
from rlhf_jax.models import transformer
from tests.models import tiny


def test_a_scan_counts_as_often_as_it_runs_and_a_gradient_twice_more() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0].sum()

    shapes = jnp.ones((8, 8)), jnp.ones((4, 8))
    once = 7 * 2 * 4 * 8 * 8
    assert costs.flops(jax.make_jaxpr(loss)(*shapes)) == once
    assert costs.flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*shapes)) == 3 * once
    again = jax.grad(jax.checkpoint(loss), argnums=(0, 1))
    assert costs.flops(jax.make_jaxpr(again)(*shapes)) == 4 * once, "remat does the forward pass a second time"


def test_a_while_loop_runs_as_often_as_one_is_told_and_of_branches_the_dearest_counts() -> None:
    x = jnp.ones((4, 4))
    body = lambda c: (c[0] + 1, c[1] @ x)  # noqa: E731
    assert costs.flops(jax.make_jaxpr(lambda: jax.lax.while_loop(lambda c: c[0] < 3, body, (0, x)))(), loops=11) == 11 * 2 * 64
    chunk = lambda c: (c[0], jax.lax.while_loop(lambda c: c[0] < 3, body, c)[1])  # noqa: E731
    nested = jax.make_jaxpr(lambda: jax.lax.while_loop(lambda c: c[0] < 3, chunk, (0, x)))
    assert costs.flops(nested(), loops=11) == 11 * 2 * 64, "chunks of tokens are the tokens"
    branches = lambda i: jax.lax.cond(i, lambda: x @ x @ x, lambda: x)  # noqa: E731
    assert costs.flops(jax.make_jaxpr(branches)(True)) == 2 * 2 * 64


@pytest.mark.parametrize("layers", [1, 2])
def test_the_compilers_count_of_an_unrolled_network(layers: int) -> None:
    config = dataclasses.replace(tiny.config(), layers=layers, scan_layers=False, hidden=128, mlp=512, heads=4, kv_heads=4, head_dim=32)
    tokens = jnp.zeros((4, 64), jnp.int32)

    def forward(params, tokens):
        hidden = transformer.trunk(config, params, tokens, tokens, jnp.ones_like(tokens))
        return transformer.unembed(config, params, hidden).sum()

    params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    traced = jax.jit(jax.grad(forward)).trace(params, tokens)
    theirs = traced.lower().compile().cost_analysis()["flops"]
    assert costs.flops(traced.jaxpr) == pytest.approx(theirs, rel=0.1), "what is not a product is little here"
