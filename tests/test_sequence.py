"""Rows whose slots are spread over devices are those of one device: losses, gradients, samples; windows, soft caps, experts, chunks of the head."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import distributed, sharding
from rlhf_jax.models import Networks, NetworkSpec, causal, kernels, layers
from tests import test_sharding
from tests.models import tiny
from tests.objectives.settings import bound
from tests.train import trainable

MESHES = {"alone": {"sequence": 2}, "with rows and heads": {"fsdp": 2, "sequence": 2, "tensor": 2}}
CONFIGS = {
    "windows": dict(windows=(3, 0), layers=3, attention_softcap=5.0, logits_chunk=3, scan_layers=True, remat="full"),
    "experts": dict(experts=4, experts_per_token=2, expert_mlp=24, kv_heads=1, logits_chunk=4),
}


@pytest.fixture(autouse=True, scope="module")
def _uncached():
    with tiny.uncached():
        yield


def mesh(**sizes: int):
    return distributed.make_mesh(sizes, int(np.prod(list(sizes.values()))))


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo", pytest.param("grpo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["with rows and heads", pytest.param("alone", marks=pytest.mark.slow)])
def test_loss_metrics_and_gradients_are_those_of_one_device(name, where):
    on = mesh(**MESHES[where])
    spec, params, frozen, batch = test_sharding.placed(name, on)
    found = test_sharding.compiled(sharding.jit(trainable.reading(bound(name), spec, 1), on), params, frozen, batch)
    trainable.same(found, trainable.alone(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_layer_and_of_head(name):
    """Everywhere and at positions; the last chunk of the head is not full, and a share of a row is smaller than its windows."""
    config, seqs = tiny.config(**CONFIGS[name]), tiny.rows(4, 12)
    some = seqs.replace(loss_positions=jnp.tile(jnp.arange(1, 11, 2), (4, 1)))
    nets = Networks({"policy": tiny.params(config)}, {}, NetworkSpec(policy=config))
    weight = jnp.cos(jnp.arange(48.0)).reshape(4, 12)

    def loss(params, *batches):
        read = nets.replace(params=params).policy
        return sum(jnp.where(batch.loss_mask, weight * read(batch).logps, 0.0).sum() for batch in batches)

    expected = tiny.jit(jax.value_and_grad(loss))(nets.params, seqs, some)
    found = test_sharding.compiled(sharding.jit(jax.value_and_grad(loss), mesh(sequence=2, fsdp=2)), nets.params, seqs, some)
    tiny.near(found, expected)


def test_a_prompt_that_neighbours_share_is_read_by_each_of_them():
    seqs = jax.tree.map(lambda x: jnp.repeat(x, 2, 0), tiny.rows(2, 12))
    nets = tiny.nets()
    run = lambda seqs: nets.policy(seqs).logps  # noqa: E731
    found = test_sharding.compiled(sharding.jit(run, mesh(sequence=2)), seqs.replace(prefix=(2, 5)))
    tiny.close(found, tiny.jit(run)(seqs), rtol=1e-5, atol=1e-5)


def test_activations_keep_their_share_of_the_slots_where_there_is_one():
    on = mesh(fsdp=2, sequence=2, tensor=2)
    pinned = sharding.jit(lambda x, y: (layers.pin(x * 2), layers.pin(y * 2)), on)(jnp.zeros((8, 6, 4)), jnp.zeros((8, 5, 4)))
    assert [test_sharding.held(x) for x in pinned] == [(4, 3, 4), (4, 5, 4)]


def test_splash_attention_over_slots_and_more_devices_than_heads(monkeypatch):
    """Interpreted: each device's queries in their own place of the row, and two devices with a copy of one head of keys."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, 256, heads, 8)), jnp.float32) for heads in (4, 1, 1)]
    ids = jnp.asarray(np.repeat([[1, 2, 0]], 2, 0).repeat([90, 150, 16], 1), jnp.int32)
    how = causal.How(0.3, 100, 0.0)
    weight = jnp.asarray(rng.normal(size=arrays[0].shape), jnp.float32) * (ids != 0)[:, :, None, None]

    def loss(fn, *x):
        return (fn(*x, ids) * weight).sum()

    asked = []

    def interpreted(query, key, value, segment_ids, **options):
        asked.append(key.shape)
        return splash(query, key, value, segment_ids, **options, interpret=True)

    splash = kernels.splash
    monkeypatch.setattr(kernels, "splash", interpreted)
    monkeypatch.setattr(causal, "platform", lambda: "tpu")
    rows = lambda *x: causal.attend_rows(*x, **how._asdict())  # noqa: E731
    plain = lambda *x: causal.blocks(*x, 0, how)  # noqa: E731
    gradient = lambda fn: jax.value_and_grad(functools.partial(loss, fn), argnums=(0, 1, 2))  # noqa: E731
    found = test_sharding.compiled(sharding.jit(gradient(rows), mesh(sequence=2, tensor=2)), *arrays)
    assert set(asked) == {(2, 256, 2, 8)}
    tiny.near(found, tiny.jit(gradient(plain))(*arrays), 5e-6)
