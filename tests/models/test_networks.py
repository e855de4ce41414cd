"""`nets`: one alignment of everything, whatever the head computes at once, however rows are chunked, wherever a leaf trains."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import Networks, NetworkSpec, layers, networks
from rlhf_jax.ops import vocab
from rlhf_jax.types import Array
from tests.models import tiny
from tests.reference import maths

V = tiny.V
BASE = tiny.config(layers=1)  # depth matters where layers train apart, and there alone
WANT = (vocab.logps, vocab.entropy, vocab.lse)


def small(**changes):
    return tiny.config(**{"layers": 1, **changes})


@functools.partial(tiny.jit, static_argnames="want")
def read(nets, seqs, keys=None, want=WANT, along=None):
    return vars(nets.policy(seqs, keys, want, along))


@tiny.jit
def reference(nets, seqs):
    return nets.ref(seqs).logps


@tiny.jit
def scores(nets, seqs):
    return nets.reward(seqs).scores


@functools.partial(tiny.jit, static_argnames="want")
def weighed(nets, seqs, keys=None, want=WANT):
    """The gradient of a sum that weighs every entry differently."""

    def total(params):
        out = vars(nets.replace(params=params).policy(seqs, keys, want))
        return sum((x * jnp.cos(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape))).sum() for x in out.values())

    return jax.grad(total)(nets.params)


# --- alignment ---


def test_log_probs_stand_at_their_token_and_are_zero_at_starts_and_pads():
    seqs = tiny.rows(4, 9)
    out = {k: np.asarray(v) for k, v in read(tiny.nets(BASE, temperature=0.7), seqs).items()}
    logits = np.asarray(tiny.logits(BASE, tiny.params(BASE), seqs), np.float64) / 0.7
    tokens, segments = np.asarray(seqs.tokens), np.asarray(seqs.segment_ids)
    starts = 0
    for b in range(4):
        for t in range(9):
            if segments[b, t] == 0 or t == 0 or segments[b, t - 1] != segments[b, t]:
                starts += segments[b, t] != 0
                assert out["logps"][b, t] == out["entropy"][b, t] == out["lse"][b, t] == 0.0
                continue
            log_p = maths.log_softmax(logits[b, t - 1])
            assert out["logps"][b, t] == pytest.approx(log_p[tokens[b, t]], abs=1e-4)
            assert out["entropy"][b, t] == pytest.approx(-(np.exp(log_p) * log_p).sum(), abs=1e-4)
            assert out["lse"][b, t] == pytest.approx(logits[b, t - 1][0] - log_p[0], abs=1e-4)
    assert starts >= 5


def lookup() -> tuple[Networks, np.ndarray]:
    """A network whose layers do nothing and whose heads read a number per token: hidden is the token's one-hot embedding."""
    config = small(hidden=V + 1, outputs=("lm", "value", "score"), norm_eps=1e-30)
    params = jax.tree.map(jnp.zeros_like, tiny.params(config))
    params["ends"]["embedding"] = jnp.eye(V, V + 1)
    params["ends"]["norm"]["scale"] = jnp.full(V + 1, (V + 1) ** -0.5)  # the norm of a one-hot row is √(V + 1) times it
    worth = np.arange(1.0, V + 1)
    kernel = jnp.asarray([*worth, 0.0])[:, None]
    params["ends"] |= {"value_head": {"kernel": kernel, "bias": jnp.asarray([0.5])}, "score_head": {"kernel": kernel}}
    return Networks({"policy": params, "reward": params}, {}, NetworkSpec(policy=config, reward=config)), worth


def test_a_value_is_read_before_its_token_and_a_score_after_it():
    """By hand: with embeddings for features, V before token t is worth[token t − 1] and the score after token t is worth[token t]."""
    seqs = tiny.row([4, 7, 2, 9, 1, 3], left=1, right=2, lengths=(2, 4))
    nets, worth = lookup()
    found = read(nets, seqs, want=("values", "scores"))
    np.testing.assert_allclose(found["values"][0], [0, 0, worth[4] + 0.5, 0, *(worth[[2, 9, 1]] + 0.5), 0, 0], atol=1e-5)
    expected = [0, *(worth[t] for t in (4, 7, 2, 9, 1, 3)), 0, 0]
    np.testing.assert_allclose(scores(nets, seqs)[0], expected, atol=1e-5)
    np.testing.assert_allclose(found["scores"][0], expected, atol=1e-5)


def test_hidden_is_the_trunks_last_state():
    seqs = tiny.rows(2, 6)
    hidden = read(tiny.nets(BASE), seqs, want=("hidden",))["hidden"]
    tiny.close(hidden @ tiny.params(BASE)["ends"]["lm_head"], tiny.logits(BASE, tiny.params(BASE), seqs), atol=1e-5)


# --- the head, at some positions, in chunks, in row chunks, with branches ---


def at_loss_positions(seqs, spare: int = 2):
    """`seqs` whose head runs on every third token; positions padded with 0. Also the mask of those positions."""
    chosen = np.zeros(seqs.tokens.shape, bool)
    chosen[..., 2::3] = True
    positions = np.zeros((*chosen.shape[:-1], chosen[0].sum() + spare), np.int32)
    positions[..., : chosen[0].sum()] = np.flatnonzero(chosen[0])
    return seqs.replace(loss_positions=jnp.asarray(positions)), chosen


def test_loss_positions_give_what_the_whole_row_gives_there():
    seqs, nets = tiny.rows(4, 9), tiny.nets(BASE)
    sparse, chosen = at_loss_positions(seqs)
    whole, some = read(nets, seqs), read(nets, sparse)
    tiny.close(some, {k: np.where(chosen, x, 0.0) for k, x in whole.items()}, atol=1e-5)

    def gradient(seqs):
        return jax.grad(lambda p: (nets.replace(params=p).policy(seqs).logps * chosen).sum())(nets.params)

    tiny.near(tiny.jit(gradient)(sparse), tiny.jit(gradient)(seqs))


@pytest.mark.parametrize(("chunk", "sparse"), [(4, False), (100, False), (2, True)])
def test_chunks_of_positions_change_nothing(chunk, sparse):
    seqs, config = tiny.rows(3, 10), small(logits_chunk=chunk)
    if sparse:
        seqs, _ = at_loss_positions(seqs)
    whole, chunked = tiny.nets(BASE, temperature=2.0), tiny.nets(config, temperature=2.0)
    tiny.close(read(chunked, seqs), read(whole, seqs), atol=1e-5)
    if chunk in (2, 4):
        tiny.near(weighed(chunked, seqs), weighed(whole, seqs))


def distance(logits: Array, target: Array, *, teacher: Array) -> Array:
    return jnp.square(logits[..., :3] - teacher).sum(-1) + 0.0 * target


def test_a_function_of_ones_own_gets_its_arrays_chunk_by_chunk():
    seqs = tiny.rows(3, 10)
    teacher = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10, 3)), jnp.float32)
    whole = read(tiny.nets(BASE), seqs, want=(distance,), along={"teacher": teacher})["distance"]
    chunked = read(tiny.nets(small(logits_chunk=4)), seqs, want=(distance,), along={"teacher": teacher})["distance"]
    tiny.close(chunked, whole, atol=1e-5)
    logits = np.asarray(tiny.logits(BASE, tiny.params(BASE), seqs))
    by_hand = ((logits[0, 4, :3] - np.asarray(teacher[0, 5])) ** 2).sum()
    assert float(whole[0, 5]) == pytest.approx(float(by_hand), rel=1e-4)


def test_row_chunks_change_nothing():
    config = small(outputs=("lm", "value", "score"), dropout=0.1)
    nets, want = tiny.nets(config), (vocab.logps, "values", "scores", "hidden")
    keys = jax.random.split(jax.random.key(0), 6)
    seqs = tiny.rows(6, 8, branches=2)
    whole = read(nets, seqs, keys, want=want)
    for chunks in (3, 4):  # 4 does not divide 6: one piece
        tiny.close(read(nets.replace(row_chunks=chunks), seqs, keys, want=want), whole, rtol=1e-4, atol=1e-5)


def test_branches_are_rows():
    seqs = tiny.rows(3, 8, branches=2)
    config = small(outputs=("lm", "value", "score"))
    nets, want = tiny.nets(config, reward=config), (*WANT, "values", "scores")
    nets = nets.replace(frozen={"ref": nets.params["policy"], "reward": nets.params["policy"]})
    both = read(nets, seqs, want=want)
    for branch in range(2):
        one = jax.tree.map(lambda x: x[:, branch], seqs)  # noqa: B023
        tiny.close({k: x[:, branch] for k, x in both.items()}, read(nets, one, want=want), atol=1e-5)
        tiny.close(reference(nets, seqs)[:, branch], reference(nets, one), atol=1e-5)
        tiny.close(scores(nets, seqs)[:, branch], scores(nets, one), atol=1e-5)


# --- dropout ---

DROPPING = small(dropout=0.3, outputs=("lm", "value"))


def test_dropout_is_a_function_of_the_rows_key():
    seqs, nets, keys = tiny.rows(6, 8), tiny.nets(DROPPING), jax.random.split(jax.random.key(0), 6)
    whole = read(nets, seqs, keys)
    np.testing.assert_array_equal(whole["logps"], read(nets, seqs, keys)["logps"])
    for part in (slice(0, 3), slice(1, 6, 2)):
        piece, piece_keys = jax.tree.map(lambda x: x[part], (seqs, keys))  # noqa: B023
        tiny.close(read(nets, piece, piece_keys), {k: x[part] for k, x in whole.items()}, rtol=1e-4, atol=1e-5)
    other = read(nets, seqs, jax.random.split(jax.random.key(1), 6))
    moved = np.abs(np.asarray(other["logps"] - whole["logps"])).max(-1)
    assert (moved > 1e-3).all()


def test_dropout_is_off_without_keys_and_in_the_reference():
    seqs, nets = tiny.rows(3, 8), tiny.nets(DROPPING)
    plain = tiny.nets(small(outputs=("lm", "value")))
    np.testing.assert_array_equal(read(nets, seqs)["logps"], read(plain, seqs)["logps"])
    np.testing.assert_array_equal(reference(nets.replace(frozen={"ref": nets.params["policy"]}), seqs), read(nets, seqs)["logps"])


def test_branches_drop_out_differently_and_dropout_keeps_the_mean():
    row = tiny.rows(1, 8)
    twins = jax.tree.map(lambda x: jnp.stack([x, x], axis=1), row)
    logps = read(tiny.nets(DROPPING), twins, jax.random.split(jax.random.key(0), 1))["logps"]
    assert np.abs(logps[:, 0] - logps[:, 1]).max() > 1e-3
    x = jnp.ones((64, 32, 16))
    dropped = layers.drop(x, jax.random.split(jax.random.key(0), 64), 0, 0.3)
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.7)} and abs(float(dropped.mean()) - 1) < 0.02


# --- noise on the embeddings ---


@functools.partial(tiny.jit, static_argnums=3)
def noise(embedded, segments, keys, alpha):
    return layers.perturb(embedded, segments, keys, alpha) - embedded


def test_noise_is_a_function_of_the_rows_key():
    seqs, nets, keys = tiny.rows(6, 8), tiny.nets(BASE), jax.random.split(jax.random.key(0), 6)
    noisy = tiny.jit(lambda seqs, keys: nets.policy(seqs, keys, noise=5.0).logps)
    whole = noisy(seqs, keys)
    for part in (slice(0, 3), slice(1, 6, 2)):
        piece, piece_keys = jax.tree.map(lambda x: x[part], (seqs, keys))  # noqa: B023
        tiny.close(noisy(piece, piece_keys), whole[part], rtol=1e-4, atol=1e-5)
    tiny.close(noisy(seqs, None), read(nets, seqs)["logps"], atol=1e-5)
    assert (np.abs(np.asarray(whole - noisy(seqs, keys[::-1]))).max(-1) > 1e-3).all()
    twins = jax.tree.map(lambda x: jnp.stack([x, x], axis=1), seqs)
    both = noisy(twins, keys)
    assert np.abs(both[:, 0] - both[:, 1]).max() > 1e-3  # branches differ


def test_noise_is_uniform_within_its_bound_and_padding_gets_none():
    """±α/√(L·D) with variance bound²/3, L the tokens of a segment; the whole row's norm is about α/√3, whatever L."""
    segments = jnp.asarray(np.repeat([[0, 1, 2, 0]], [10, 150, 50, 40], axis=1).repeat(3, 0), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = np.asarray(noise(jnp.zeros((3, 250, 16)), segments, keys, 6.0))
    assert not drawn[:, :10].any() and not drawn[:, -40:].any()
    for part in (drawn[:, 10:160], drawn[:, 160:210]):
        bound = 6.0 / np.sqrt(part.shape[1] * 16)
        assert 0.99 * bound < np.abs(part).max() <= bound
        assert abs(part.mean()) < 0.05 * bound and part.var() == pytest.approx(bound**2 / 3, rel=0.05)
        np.testing.assert_allclose(np.linalg.norm(part, axis=(1, 2)), 6.0 / np.sqrt(3), rtol=0.05)
    half = jnp.ones((3, 250, 16), jnp.bfloat16)
    assert layers.perturb(half, segments, keys, 6.0).dtype == jnp.bfloat16
    assert layers.perturb(half, segments, None, 6.0) is half and layers.perturb(half, segments, keys, 0.0) is half


# --- who trains, who is frozen ---


def halves(tree):
    """(heads and layer 0, the rest) of a policy's tree."""
    first = {"ends": {k: v for k, v in tree["ends"].items() if k != "embedding"}, "layers": {"0": tree["layers"]["0"]}}
    return first, {"ends": {"embedding": tree["ends"]["embedding"]}, "layers": {"1": tree["layers"]["1"]}}


def test_trained_and_frozen_leaves_make_one_network():
    seqs, whole = tiny.rows(3, 8), tiny.nets()
    trained, base = halves(tiny.params())
    split = Networks({"policy": trained}, {"base": {"policy": base}}, whole.spec)
    tiny.close(read(split, seqs), read(whole, seqs), rtol=0, atol=0)
    want, _ = halves(weighed(whole, seqs)["policy"])
    got = weighed(split, seqs)["policy"]
    assert set(got["layers"]) == {"0"} and "embedding" not in got["ends"]
    tiny.near(got, want)
    frozen_only = Networks({}, {"base": {"policy": tiny.params()}}, whole.spec)
    assert frozen_only.has("policy") and not frozen_only.has("ref")
    tiny.close(read(frozen_only, seqs), read(whole, seqs), rtol=0, atol=0)


def test_the_reference_shares_the_frozen_base_and_gets_no_gradient():
    seqs = tiny.rows(3, 8)
    trained, base = halves(tiny.params(seed=1))
    before, _ = halves(tiny.params(seed=2))
    nets = Networks({"policy": trained}, {"base": {"policy": base}, "ref": before}, NetworkSpec(policy=tiny.BASE))
    expected = tiny.nets().replace(params={"policy": networks.merge(before, base)})
    tiny.close(reference(nets, seqs), read(expected, seqs)["logps"], atol=1e-5)
    slopes = tiny.jit(jax.grad(lambda f: nets.replace(frozen=f).ref(seqs).logps.sum()))(nets.frozen)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(slopes))


def test_a_reference_of_another_architecture():
    other = small(heads=2, kv_heads=1, mlp=8)
    nets = tiny.nets(BASE, ref=other, temperature=0.5).replace(frozen={"ref": tiny.params(other)})
    seqs = tiny.rows(3, 8)
    tiny.close(reference(nets, seqs), read(tiny.nets(other, temperature=0.5), seqs)["logps"], atol=1e-5)


def test_merge_lets_the_first_tree_win():
    assert networks.merge({"a": {"x": 1}}, {"a": {"x": 2, "y": 3}, "b": 4}) == {"a": {"x": 1, "y": 3}, "b": 4}
    assert networks.merge({"a": 1}, None) == {"a": 1}


def test_values_come_from_the_shared_trunk_or_from_a_separate_critic():
    seqs = tiny.rows(3, 8)
    both, alone = small(outputs=("lm", "value")), small(outputs=("value",))
    shared = tiny.nets(both)
    critic = Networks({"policy": tiny.params(BASE), "critic": tiny.params(alone, 5)}, {}, NetworkSpec(policy=BASE, critic=alone))
    want = (vocab.logps, "values")
    assert np.abs(read(shared, seqs, want=want)["values"]).max() > 0
    tiny.close(read(critic, seqs, want=want)["logps"], read(tiny.nets(BASE), seqs)["logps"], atol=1e-5)
    tiny.close(read(critic, seqs, want=want)["values"], read(tiny.nets(alone, seed=5), seqs, want=("values",))["values"], atol=1e-5)

    def slopes(nets):
        return tiny.jit(jax.grad(lambda p: nets.replace(params=p).policy(seqs, want=("values",)).values.sum()))(nets.params)

    apart = slopes(critic)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(apart["policy"]))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(apart["critic"]))
    assert np.asarray(slopes(shared)["policy"]["layers"]["0"]["query"]["kernel"]).any()


def test_a_network_that_is_not_there_is_named():
    for nets in (tiny.nets(BASE), tiny.nets(BASE, reward=BASE)):
        with pytest.raises(ValueError, match="reward network"):
            nets.reward(tiny.rows(2, 5))


def test_wrong_shapes_are_refused():
    nets, seqs = tiny.nets(BASE), tiny.rows(2, 5)
    flat = jax.tree.map(lambda x: x[0], seqs)
    cache = networks.transformer.empty_cache(BASE, 2, 8)
    bad = [
        lambda: nets.policy(flat),
        lambda: nets.policy(seqs.replace(positions=seqs.positions[:, :4])),
        lambda: nets.replace(frozen={"ref": nets.params["policy"]}).ref(flat),
        lambda: tiny.nets(BASE, reward=BASE).reward(flat),
        lambda: nets.prefill(flat.tokens, flat.positions, flat.segment_ids, 8),
        lambda: nets.prefill(seqs.tokens, seqs.positions[:, :4], seqs.segment_ids, 8),
        lambda: nets.decode(seqs.tokens, seqs.tokens, 5, jnp.ones((2, 8), bool), cache),
        lambda: nets.decode(seqs.tokens[:, 0], seqs.tokens[:1, 0], 5, jnp.ones((2, 8), bool), cache),
        lambda: nets.decode(seqs.tokens[:, 0], seqs.tokens[:, 0], 5, jnp.ones((2, 7), bool), cache),
    ]
    for call in bad:
        with pytest.raises(AssertionError):
            call()
