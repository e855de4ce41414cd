"""A prompt computed once for all its responses gives what every row gives alone, gradients included; rows that do not share it read NaN."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import Networks, NetworkSpec
from rlhf_jax.ops import vocab
from rlhf_jax.types import Sequences
from tests.models import tiny

G, P, N, GROUPS = 3, 7, 5, 4
CONFIGS = {
    "plain": {},
    "windows": dict(layers=3, windows=(4, 0), attention_softcap=5.0, qk_norm="head", norm_placement="both"),
    "scanned": dict(layers=5, scan_layers=True, remat="full", windows=(3, 0)),
    "scanned to the end": dict(layers=4, scan_layers=True, remat="dots"),
    "learned positions": dict(position="learned", positions=64, norm="layer", norm_placement="parallel", kv_heads=4),
}


def rollout(seed: int = 0, group: int = G) -> Sequences:
    """Left-padded prompts shared by neighbours, responses of several lengths, the last group filler."""
    rng = np.random.default_rng(seed)
    rows = GROUPS * group
    lengths = rng.integers(1, P + 1, GROUPS).repeat(group)
    new = rng.integers(1, N + 1, rows)
    new[0], lengths[-group:] = N, 0
    new[-group:] = 0
    at = np.arange(P + N)
    real = (at >= P - lengths[:, None]) & (at < P + new[:, None])
    prompt = rng.integers(1, tiny.V, (GROUPS, P)).repeat(group, 0)
    tokens = np.where(real, np.concatenate([prompt, rng.integers(1, tiny.V, (rows, N))], 1), 0)
    positions = np.where(real, at - (P - lengths[:, None]), 0)
    return Sequences(
        tokens=jnp.asarray(tokens, jnp.int32), positions=jnp.asarray(positions, jnp.int32), segment_ids=jnp.asarray(real, jnp.int32),
        loss_mask=jnp.asarray(real & (at >= P)), loss_positions=jnp.broadcast_to(P + jnp.arange(N, dtype=jnp.int32), (rows, N)), prefix=(group, P),
    )


def readings(config, seqs, outputs, chunks=1):
    """What is read of the responses, and the gradient of a weighted sum of it."""
    config = tiny.config(**config, outputs=outputs)
    nets = Networks({"policy": tiny.params(config)}, {}, NetworkSpec(policy=config, temperature=0.7), row_chunks=chunks)
    want = (vocab.logps, vocab.entropy, "values")
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, *seqs.tokens.shape)), jnp.float32)

    @functools.partial(tiny.jit)
    def run(params, seqs):
        def loss(params):
            out = nets.replace(params=params).policy(seqs, want=want)
            read = [jnp.where(seqs.loss_mask, x, 0.0) for x in (out.logps, out.entropy, out.values)]
            return sum((w * x).sum() for w, x in zip(weights, read)), read

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, read), grads = run(nets.params, seqs)
    return read, grads


@pytest.mark.parametrize(("name", "group"), [("plain", 1), *((name, G) for name in CONFIGS)])
def test_readings_and_gradients(name: str, group: int) -> None:
    seqs = rollout(group=group)
    found, grads = readings(CONFIGS[name], seqs, ("lm", "value"))
    wanted, exact = readings(CONFIGS[name], seqs.replace(prefix=None), ("lm", "value"))
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, atol=2e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(exact)):
        assert jnp.linalg.norm(one - other) <= 1e-5 * jnp.linalg.norm(other) + 1e-6


@pytest.mark.parametrize("chunks", [2, 3])
def test_chunks_of_whole_groups_and_of_rows(chunks: int) -> None:
    """Two parts hold two groups each; three do not, and are read row by row."""
    seqs = rollout()
    found, _ = readings({}, seqs, ("lm", "value"), chunks)
    wanted, _ = readings({}, seqs.replace(prefix=None), ("lm", "value"))
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_rows_that_were_moved_apart_read_nan() -> None:
    seqs = rollout()
    moved = jax.tree.map(lambda x: x[jnp.arange(GROUPS * G)[::-1].at[4].set(0)], seqs)  # row 4 is another group's
    nets = tiny.nets()
    logps = nets.policy(moved).logps
    assert jnp.isnan(logps[4]).any()
    whole = np.arange(GROUPS * G) // G != 1
    assert not jnp.isnan(logps[whole]).any()


def test_a_reward_model_scores_with_the_prompt_shared() -> None:
    config = tiny.config(outputs=("score",))
    nets = Networks({"reward": tiny.params(config)}, {}, NetworkSpec(reward=config))
    seqs = rollout()
    at = seqs.loss_mask
    np.testing.assert_allclose(jnp.where(at, nets.reward(seqs).scores, 0), jnp.where(at, nets.reward(seqs.replace(prefix=None)).scores, 0), atol=2e-5)


def test_the_prompt_is_computed_once() -> None:
    """In the compiled program's own count of operations: what is saved is the prompt of all rows of a group but one."""
    config = tiny.config(hidden=64, heads=4, head_dim=16, kv_heads=4, mlp=256, layers=4)
    nets = Networks({"policy": tiny.params(config)}, {}, NetworkSpec(policy=config))
    rng = np.random.default_rng(0)
    prompt, new, group = 48, 16, 4
    tokens = jnp.asarray(np.concatenate([rng.integers(1, tiny.V, (2, prompt)).repeat(group, 0), rng.integers(1, tiny.V, (8, new))], 1), jnp.int32)
    at = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), tokens.shape)
    seqs = Sequences(tokens=tokens, positions=at, segment_ids=jnp.ones_like(at), loss_mask=at >= prompt,
                     loss_positions=at[:, prompt:], prefix=(group, prompt))

    def operations(seqs: Sequences) -> float:
        run = tiny.jit(lambda p, s: jax.grad(lambda p: nets.replace(params=p).policy(s).logps.sum())(p))
        return run.lower(nets.params, seqs).compile().cost_analysis()["flops"]

    shared, apart = operations(seqs), operations(seqs.replace(prefix=None))
    tokens_left = (prompt + group * new) / (group * (prompt + new))
    assert shared < 1.1 * tokens_left * apart
