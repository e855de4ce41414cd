"""The transformer against its papers, and what must not change a logit: padding, neighbours, packing, later tokens, recomputation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import attention, layers, layout, rope, transformer
from rlhf_jax.types import Sequences
from tests.models import tiny
from tests.reference import transformer as reference

BASE, V = tiny.BASE, tiny.V


@functools.partial(tiny.jit, static_argnums=0)
def init(config):
    return transformer.init(config, jax.random.key(0))


@functools.partial(tiny.jit, static_argnums=0)
def nll(config, params, seqs):
    """Loss and gradient."""
    return jax.value_and_grad(lambda p: -tiny.nets(config).replace(params={"policy": p}).policy(seqs).logps.sum())(params)


def shape(config):
    return dict(heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim, theta=config.rope_theta, eps=config.norm_eps)


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1, "norm_eps": 0.1}, {"kv_heads": 4, "head_dim": 6, "layers": 1}, {"tied": True}])
def test_logits_are_those_of_the_papers(changes):
    config = tiny.config(**changes)
    params, seqs = tiny.params(config), tiny.rows(4, 11)
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), layout.to_canonical(params))
    head = tree["ends"]["embedding"].T if config.tied else tree["ends"]["lm_head"]
    got = np.asarray(tiny.logits(config, params, seqs))
    for b in range(4):
        tokens, positions, segments = (np.asarray(x[b]) for x in (seqs.tokens, seqs.positions, seqs.segment_ids))
        want = reference.hidden(tree, tokens, positions, segments, **shape(config)) @ head
        real = segments != 0
        assert real.any() and not real.all()
        np.testing.assert_allclose(got[b][real], want[real], rtol=1e-4, atol=2e-5)
    assert np.isfinite(got).all()


def test_tied_means_one_table():
    assert "lm_head" not in tiny.params(tiny.config(tied=True))["ends"] and "lm_head" in tiny.params()["ends"]


def test_the_first_layers_draw_depends_on_its_number_alone():
    three, two = (init(tiny.config(layers=n))["layers"] for n in (3, 2))
    # All but residual outputs, which are scaled by the depth.
    for name in ("query", "key", "value", "gate", "up"):
        np.testing.assert_array_equal(three["1"][name]["kernel"], two["1"][name]["kernel"])
        assert not np.array_equal(two["0"][name]["kernel"], two["1"][name]["kernel"])


def test_a_reward_head_starts_at_its_std_and_a_value_head_at_zero():
    config = tiny.config(hidden=256, layers=1, outputs=("lm", "score", "value"))
    ends = init(config)["ends"]
    assert float(ends["score_head"]["kernel"].std()) == pytest.approx(257**-0.5, rel=0.15)
    assert not any(leaf.any() for leaf in ends["value_head"].values()) and set(ends["score_head"]) == {"kernel"}


# --- padding, neighbours, packing ---


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 5), (2, 3)])
def test_padding_changes_no_logit(left, right):
    tokens = np.random.default_rng(1).integers(0, V, 7)
    bare = tiny.logits(BASE, tiny.params(), tiny.row(tokens))
    for fill in (0, 3):
        padded = tiny.logits(BASE, tiny.params(), tiny.row(tokens, left=left, right=right, fill=fill))
        tiny.close(padded[:, left : left + 7], bare, rtol=2e-5, atol=2e-5)


def test_neighbours_change_no_logit():
    rows = tiny.rows(4, 9, seed=2)
    others = tiny.rows(4, 9, seed=3)
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b[1:]]), rows, others)
    a, b = tiny.logits(BASE, tiny.params(), rows), tiny.logits(BASE, tiny.params(), mixed)
    np.testing.assert_array_equal(a[0], b[0])
    assert not np.allclose(a[1], b[1])


def packed_and_apart() -> tuple[Sequences, Sequences]:
    tokens = np.random.default_rng(4).integers(0, V, 12)
    together = tiny.row(tokens, lengths=(5, 7))
    apart = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]), tiny.row(tokens[:5], right=7), tiny.row(tokens[5:], left=5)
    )
    return together, apart


def test_a_packed_row_has_the_logits_loss_and_gradient_of_its_segments():
    together, apart = packed_and_apart()
    packed, single = (tiny.logits(BASE, tiny.params(), s) for s in (together, apart))
    tiny.close(packed[0, :5], single[0, :5], rtol=2e-5, atol=2e-5)
    tiny.close(packed[0, 5:], single[1, 5:], rtol=2e-5, atol=2e-5)

    (a, ga), (b, gb) = (nll(BASE, tiny.params(), seqs) for seqs in (together, apart))
    tiny.close(a, b)
    tiny.near(ga, gb)


def test_positions_count_within_the_segment():
    """Rotations are relative, so a constant shift changes nothing, while restarting at another place does."""
    seqs = tiny.row(np.arange(8))
    shifted = seqs.replace(positions=seqs.positions + 5)
    tiny.close(tiny.logits(BASE, tiny.params(), shifted), tiny.logits(BASE, tiny.params(), seqs), rtol=1e-4, atol=1e-5)
    stretched = seqs.replace(positions=seqs.positions * 2)
    assert np.abs(tiny.logits(BASE, tiny.params(), stretched) - tiny.logits(BASE, tiny.params(), seqs)).max() > 1e-2


def test_no_logit_depends_on_a_later_token_on_padding_or_on_another_segment():
    """By gradients: ∂ logits[t] / ∂ embedding[s] is zero unless s ≤ t in t's own segment."""
    seqs = tiny.row(np.arange(8), left=1, right=1, lengths=(3, 5))
    seqs = seqs.replace(tokens=jnp.asarray([[15, *range(8), 16]], jnp.int32))  # each slot has a table row of its own
    params = tiny.params()

    @tiny.jit
    def influence(params):
        def one(t):
            def read(table_rows):
                table = params["ends"]["embedding"].at[seqs.tokens[0]].set(table_rows)
                ends = {**params["ends"], "embedding": table}
                hidden = transformer.trunk(BASE, {**params, "ends": ends}, seqs.tokens, seqs.positions, seqs.segment_ids)
                return (hidden[0, t] * jnp.arange(1.0, 17.0)).sum()

            return jnp.abs(jax.grad(read)(params["ends"]["embedding"][seqs.tokens[0]])).sum(-1)

        return jax.vmap(one)(jnp.arange(10))

    found = np.asarray(influence(params))
    segments = np.asarray(seqs.segment_ids[0])
    for t in range(1, 9):
        for s in range(10):
            expected = s <= t and segments[s] == segments[t] != 0
            assert (found[t, s] > 0) == expected, (t, s, found[t, s])


def trunk(params, seqs):
    return transformer.trunk(BASE, params, seqs.tokens, seqs.positions, seqs.segment_ids)


def test_a_query_that_may_see_nothing_is_finite_with_a_finite_gradient():
    seqs = tiny.row(np.arange(4), left=3)
    empty = seqs.replace(segment_ids=jnp.zeros_like(seqs.segment_ids))
    for case in (seqs, empty):
        value, grads = tiny.jit(jax.value_and_grad(lambda p, s=case: trunk(p, s).sum()))(tiny.params())
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


# --- recomputation and precision ---


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
@pytest.mark.parametrize("scan", [False, True])
def test_remat_changes_neither_loss_nor_gradient(remat, scan):
    plain, other = tiny.config(scan_layers=scan), tiny.config(scan_layers=scan, remat=remat)
    seqs, params = tiny.rows(2, 8), layout.to_runtime(tiny.params(), int(scan))
    (a, ga), (b, gb) = (nll(c, params, seqs) for c in (plain, other))
    tiny.close(a, b, rtol=1e-6)
    tiny.near(gb, ga, 1e-6)


def test_bfloat16_compute_is_finite_and_near_and_leaves_float32_logits():
    half, seqs = tiny.config(compute_dtype="bfloat16"), tiny.rows(4, 9)
    wide, narrow = tiny.logits(BASE, tiny.params(), seqs), tiny.logits(half, tiny.params(), seqs)
    real = np.asarray(seqs.segment_ids) != 0
    assert narrow.dtype == jnp.float32
    gap = np.abs(np.asarray(narrow - wide))[real]
    assert 0 < gap.max() < 0.15 * np.abs(np.asarray(wide)[real]).max()
    _, grads = nll(half, tiny.params(), seqs)
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_bfloat16_parameters_are_kept_as_such():
    config = tiny.config(param_dtype="bfloat16", compute_dtype="bfloat16", outputs=("lm", "value", "score"))
    params = init(config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert np.isfinite(tiny.logits(config, params, tiny.rows(2, 5))).all()


# --- wrong shapes ---


def test_wrong_shapes_are_refused():
    params, seqs = tiny.params(), tiny.rows(2, 6)
    q, cache = jnp.zeros((2, 6, 4, 4)), transformer.empty_cache(BASE, 2, 6)
    bad = [
        lambda: transformer.trunk(BASE, params, seqs.tokens[0], seqs.positions[0], seqs.segment_ids[0]),
        lambda: transformer.trunk(BASE, params, seqs.tokens, seqs.positions[:, :5], seqs.segment_ids),
        lambda: transformer.unembed(BASE, params, jnp.zeros((2, 6, 15))),
        lambda: transformer.scalar(BASE, params, jnp.zeros((2, 6, 15)), "value"),
        lambda: attention.attend(q, q[:, :, :2], q[:, :, :2], jnp.ones((2, 6, 5), bool), scale=1.0),
        lambda: attention.attend(q, q[:, :, :2], q[:, :5, :2], jnp.ones((2, 6, 6), bool), scale=1.0),
        lambda: attention.visibility(seqs.segment_ids[0]),
        lambda: attention.within(seqs.segment_ids, 0, 3),
        lambda: rope.tables(BASE, seqs.positions[0]),
        lambda: rope.rotate(q[0], (q[0], q[0])),
        lambda: layers.drop(jnp.zeros((2, 6)), None, 0, 0.1),
        lambda: layers.pin(jnp.zeros((2, 6))),
        lambda: transformer.init(BASE, jax.random.split(jax.random.key(0), 2)),
        lambda: transformer.cached(BASE, params, seqs.tokens, seqs.positions, jnp.ones((2, 6), bool), cache, 0),
    ]
    for call in bad:
        with pytest.raises(AssertionError):
            call()
