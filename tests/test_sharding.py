"""Sharded ≡ unsharded, for every objective and every shape of mesh; parameters and optimizer state really are sharded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import distributed, objectives, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import NetworkSpec, layers, transformer
from rlhf_jax.ops import partition
from rlhf_jax.train import optimizer
from rlhf_jax.train.start import Start
from rlhf_jax.train.step import make_step
from tests.models import tiny
from tests.objectives.settings import bound
from tests.train import trainable

MESHES = {"fsdp2d": ((1, 4, 2), 0), "data": ((8, 1, 1), 0), "fsdp": ((1, 8, 1), 0), "all": ((2, 2, 2), 0), "tensor": ((1, 1, 2), 2)}


@pytest.fixture(autouse=True, scope="module")
def _uncached():
    with tiny.uncached():
        yield


def mesh(name: str):
    sizes, devices = MESHES[name]
    return distributed.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)), devices, rules=name if name in distributed.RULES[1:] else "tensor")


def shardings(on, config, name: str):
    shapes = jax.eval_shape(lambda: {name: transformer.init(config, jax.random.key(0))})
    return sharding.parameter_shardings(on, {name: transformer.logical_axes(config)}, shapes)


def placed(name: str, on):
    """(spec, params, frozen, batch) of an objective on a mesh."""
    nets = trainable.networks(name)
    config, kind = (trainable.SCORER, "reward") if name in trainable.SCORERS else (trainable.MODEL, "policy")
    where = shardings(on, config, kind)
    frozen = {key: jax.device_put(tree, where["policy"]) for key, tree in nets.frozen.items()}
    batch = distributed.to_global(trainable.batch(name), sharding.row_sharding(on))
    return nets.spec, jax.device_put(nets.params, where), frozen, batch


def compiled(program, *arguments):
    """What a program returns, compiled quickly."""
    return program.lower(*arguments).compile(tiny.QUICK)(*arguments)


EVERY = [pytest.param(name, marks=() if name in trainable.REPRESENTATIVE else pytest.mark.slow) for name in trainable.NAMES]


def test_every_kind_of_batch_is_tested_in_ci():
    kinds = {bound(name).batch_type for name in trainable.REPRESENTATIVE}
    assert kinds == {bound(name).batch_type for name in objectives.names()}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("where", [pytest.param(where, marks=pytest.mark.slow if where == "fsdp2d" else ()) for where in MESHES])
def test_loss_metrics_and_gradients_are_those_of_one_device(name, where):
    on = mesh(where)
    spec, params, frozen, batch = placed(name, on)
    found = compiled(sharding.jit(trainable.reading(bound(name), spec, 1), on), params, frozen, batch)
    expected = trainable.alone(name)
    assert all(np.abs(g).max() > 0 for path, g in tiny.canonical(expected[0]).items() if "value" not in path or name == "ppo")
    trainable.same(found, expected)


@pytest.mark.parametrize("name", EVERY)
def test_four_microbatches_are_one_batch(name):
    trainable.same(trainable.alone(name, 4), trainable.alone(name))


def test_four_microbatches_on_a_mesh_are_one_batch_on_one_device():
    on = mesh("all")
    spec, params, frozen, batch = placed("ppo", on)
    found = compiled(sharding.jit(trainable.reading(bound("ppo"), spec, 4), on), params, frozen, batch)
    trainable.same(found, trainable.alone("ppo"))


# --- who holds what ---


def start(on, name: str, pattern: str = ".*", objective: str = "sft") -> Start:
    tx, _ = optimizer.build({**trainable.OPTIMIZER, "name": name, "ema_decay": 0.5}, 10)
    config = {"seed": 0, "trainable": pattern, "lora": {"rank": 0}, "model": {"add_tokens": ()}}
    return Start(config, bound(objective), NetworkSpec(policy=trainable.MODEL), tx, {"policy": trainable.MODEL}, {}, on, {})


def held(x) -> tuple[int, ...]:
    """The shape that one device holds."""
    return x.addressable_shards[0].data.shape


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_are_sharded_and_the_optimizers_state_follows(name):
    state = start(mesh("all"), name).state()
    policy = state.params["policy"]
    layer = policy["layers"]["scan"]["0of1"]
    # hidden 16, heads 4 × 4 and 2 × 4, mlp 24, vocab 16; fsdp 2 splits `embed`, tensor 2 the other one.
    assert held(layer["query"]["kernel"]) == (2, 8, 8) and held(layer["key"]["kernel"]) == (2, 8, 4)
    assert held(layer["output"]["kernel"]) == (2, 8, 8) and held(layer["gate"]["kernel"]) == (2, 8, 12)
    assert held(layer["down"]["kernel"]) == (2, 12, 8) and held(layer["attention_norm"]["scale"]) == (2, 16)
    assert held(policy["ends"]["embedding"]) == (8, 8) and held(policy["ends"]["lm_head"]) == (8, 8)
    where = {path[-3:]: leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    followed = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        if leaf.ndim and path[-3:] in where:
            assert leaf.sharding.is_equivalent_to(where[path[-3:]], leaf.ndim), jax.tree_util.keystr(path)
            followed += 1
        else:
            assert leaf.sharding.is_fully_replicated
    kernels = sum("kernel" in jax.tree_util.keystr(p) and "layers" in jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(policy))
    moments = 2 * len(where) - (kernels if name == "muon" else 0)  # Muon keeps one moment of a matrix
    assert followed == moments + len(where)  # and the moving average


def test_a_carry_that_holds_parameters_is_sharded_like_them():
    begun = start(mesh("all"), "adamw", objective="tr_dpo")
    state = begun.state()
    same = jax.tree.map(lambda ref, x: ref.sharding.is_equivalent_to(x.sharding, x.ndim), state.carry["policy"], state.params["policy"])
    assert all(jax.tree.leaves(same)) and held(state.carry["policy"]["ends"]["embedding"]) == (8, 8)
    assert state.carry["batches"].sharding.is_fully_replicated
    buffers = [{shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) for shard in x.addressable_shards}
               for tree in (state.params, state.carry)]
    assert not buffers[0] & buffers[1]  # a donated buffer that two leaves share is gone for both


def test_the_first_state_does_not_depend_on_the_mesh():
    one = start(distributed.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, 1), "adamw").state()
    many = start(mesh("all"), "adamw").state()
    tiny.close(tiny.canonical(many.params), tiny.canonical(one.params), rtol=1e-6, atol=1e-7)
    assert jax.random.key_data(many.key).tolist() == jax.random.key_data(one.key).tolist()


def test_rows_are_split_over_data_and_fsdp_and_activations_stay_so():
    on = mesh("all")
    assert sharding.row_devices(on) == 4 and held(jax.device_put(jnp.zeros((8, 3)), sharding.row_sharding(on))) == (2, 3)
    assert held(jax.device_put(jnp.zeros((8, 3)), sharding.replicated(on))) == (8, 3)
    pinned = sharding.jit(lambda x: layers.pin(x * 2), on)(jnp.zeros((8, 3, 4)))
    assert held(pinned) == (2, 3, 4)
    assert partition.constrain(jnp.zeros((3, 4)), ("batch", None)).shape == (3, 4)  # without axis rules a no-op
    with pytest.raises(AssertionError):
        partition.constrain(jnp.zeros((3, 4)), ("batch",))


@pytest.mark.parametrize(
    ("changes", "sizes", "said"),
    [
        ({"hidden": 12}, (1, 8, 1), r"config\.mesh\.fsdp = 8 does not divide the 12 of axis 'embed'"),
        ({"kv_heads": 1, "head_dim": 4}, (1, 1, 8), r"config\.mesh\.tensor = 8 does not divide the 4 of axis 'kv_heads'"),
        ({"mlp": 20}, (1, 1, 8), r"config\.mesh\.tensor = 8 does not divide the"),
    ],
)
def test_an_axis_that_does_not_divide_is_named(changes, sizes, said):
    on = distributed.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)))
    with pytest.raises(UserError, match=said):
        shardings(on, tiny.config(**{"vocab_size": 16, **changes}), "policy")


def test_two_axes_may_split_parameters_and_rows_alike():
    on = distributed.make_mesh({"fsdp": 4, "tensor": 2}, rules="fsdp2d")
    where = shardings(on, tiny.config(vocab_size=16), "policy")["policy"]
    assert where["layers"]["0"]["query"]["kernel"].spec == PartitionSpec("fsdp", "fsdp2")
    assert sharding.row_devices(on) == 8 and held(jax.device_put(jnp.zeros((8, 3)), sharding.row_sharding(on))) == (1, 3)
    assert sharding.row_axes(on) == "data × fsdp × expert × tensor" and sharding.row_axes(mesh("all")) == "data × fsdp × expert"
    with pytest.raises(UserError, match=r"config\.mesh\.tensor = 8 does not divide the 4 of axis 'kv_heads'"):
        shardings(distributed.make_mesh({"tensor": 8}, rules="fsdp2d"), tiny.config(vocab_size=16, kv_heads=1, head_dim=4), "policy")


def test_a_vocabulary_that_the_mesh_does_not_divide_stays_whole():
    where = shardings(distributed.make_mesh({"data": 4, "tensor": 2}), tiny.config(vocab_size=17), "policy")["policy"]
    assert where["ends"]["embedding"].spec == PartitionSpec(None, "fsdp") and where["ends"]["lm_head"].spec == PartitionSpec("fsdp", None)
    assert where["layers"]["0"]["query"]["kernel"].spec == PartitionSpec("fsdp", "tensor")


# --- jit ---


def test_a_donated_state_is_gone_and_the_step_is_compiled_once():
    on, name = mesh("all"), "sft"
    begun = start(on, "adamw")
    tx, rate = optimizer.build({**trainable.OPTIMIZER, "ema_decay": 0.5}, 10)
    step = make_step(bound(name), NetworkSpec(policy=trainable.MODEL), tx, rate, microbatches=2, epochs=1, minibatches=1)
    traces = []

    def counted(*arguments):
        traces.append(1)
        return step(*arguments)

    run = sharding.jit(counted, on, donate=(0,), out_shardings=(begun.shardings, None))
    state, batch = begun.state(), distributed.to_global(trainable.batch(name), sharding.row_sharding(on))
    first = state
    for _ in range(3):
        state, metrics = run(state, {}, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params)) and not batch.tokens.is_deleted()
    assert len(traces) == 1
    assert np.isfinite(float(metrics["loss/nll"].compute())) and int(state.step) == 3
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, begun.shardings)))


def test_static_arguments_and_out_shardings_pass_through():
    on = mesh("all")
    where = NamedSharding(on, PartitionSpec("data"))
    double = sharding.jit(lambda x, times: x * times, on, static=(1,), out_shardings=where)
    out = double(jnp.ones(8), 3)
    assert held(out) == (4,) and float(out.sum()) == 24.0
