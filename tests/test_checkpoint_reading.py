"""Reading a checkpoint's parameters alone, and the digests that tell trees apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.checkpoint import Checkpointer, load_params, state_hash, tree_digest
from rlhf_jax.errors import UserError
from tests.checkpoints import abstract, flip_a_bit, mesh, params, saved

# --- load_params ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    saved(workdir / "checkpoints", steps=[10, 20])
    saved(workdir / "best", steps=[15], keep=1)
    return workdir


@pytest.mark.parametrize(
    "path, which, seed",
    [
        ("", "latest", 20),
        ("", "best", 15),
        ("", 10, 10),
        ("", 15, 15),
        ("checkpoints", "latest", 20),
        ("checkpoints", "best", 15),
        ("checkpoints", 10, 10),
        ("checkpoints/10", "latest", 10),
        ("best", "latest", 15),
        ("best/15", "latest", 15),
    ],
)
def test_load_params_finds_the_step(run, path, which, seed):
    loaded, meta = load_params(run / path, key="config.init_from", which=which)
    folder = run / ("best" if seed == 15 else "checkpoints") / str(seed)
    assert len(meta.pop("fingerprint")) == 64 and meta == {"seed": seed, "checkpoint": str(folder.resolve())}
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(loaded))
    assert jax.tree.structure(loaded) == jax.tree.structure(params()) and state_hash(loaded) == state_hash(params(seed))


def test_load_params_onto_shardings(run):
    target = NamedSharding(mesh(4), PartitionSpec("data"))
    loaded, _ = load_params(run, key="config.init_from", abstract=abstract(params(), target))
    assert state_hash(loaded) == state_hash(params(20)) and loaded["policy"]["w"].sharding.is_equivalent_to(target, 2)


def test_load_params_keeps_empty_dicts_odd_names_and_keys(tmp_path):
    tree = {"a.b": {"c/d": np.ones(2), "~2": np.zeros(1)}, "none": None, "empty": {}, "key": jax.random.key(3), "z": np.zeros((0, 2))}
    with Checkpointer(tmp_path, every=1, keep=1) as saver:
        saver.save(1, {"params": tree}, {})
    loaded, _ = load_params(tmp_path, key="config.init_from")
    assert jax.tree.structure(loaded) == jax.tree.structure(tree) and state_hash(loaded) == state_hash(tree)


def test_load_params_says_what_it_looked_for(run, tmp_path):
    with pytest.raises(UserError, match=r"config\.reference_from = .*nowhere.* does not exist \(looked for .*nowhere/checkpoints"):
        load_params(tmp_path / "nowhere", key="config.reference_from")
    with pytest.raises(UserError, match=r"config\.reward_from = .* holds no such checkpoint \(looked for .*best"):
        load_params(tmp_path, key="config.reward_from", which="best")
    with pytest.raises(UserError, match=r"config\.init_from.*checkpoints/99"):
        load_params(run, key="config.init_from", which=99)


def test_load_params_refuses_damage_misfits_and_other_items(tmp_path):
    saved(tmp_path / "checkpoints", steps=[1, 2])
    flip_a_bit(tmp_path / "checkpoints" / "2")
    for target in (None, abstract(params())):
        with pytest.raises(UserError, match=r"config\.init_from.*2 is damaged"):
            load_params(tmp_path, key="config.init_from", abstract=target)
    assert (tmp_path / "checkpoints" / "2").exists(), "another run's folder is not ours to change"
    with pytest.raises(UserError, match=r"config\.init_from.*policy/w has shape \(64, 64\) in the checkpoint and \(4, 4\) here"):
        load_params(tmp_path, key="config.init_from", which=1, abstract={"policy": {"w": jnp.zeros((4, 4)), "b": params()["policy"]["b"]}})
    with Checkpointer(tmp_path / "other", every=1, keep=1) as saver:
        saver.save(1, {"rest": params()}, {})
    with pytest.raises(UserError, match=r"no item 'params', only \['rest'\]"):
        load_params(tmp_path / "other", key="config.init_from")


# --- digests ---


def test_digests_tell_values_dtypes_shapes_paths_and_keys_apart():
    base = {"x": jnp.zeros(4), "key": jax.random.key(0)}
    others = [
        {"x": jnp.zeros(4).at[2].set(-0.0), "key": jax.random.key(0)},
        {"x": jnp.zeros(4, jnp.int32), "key": jax.random.key(0)},
        {"x": jnp.zeros((2, 2)), "key": jax.random.key(0)},
        {"y": jnp.zeros(4), "key": jax.random.key(0)},
        {"x": jnp.zeros(4), "key": jax.random.key(1)},
        {"x": jnp.zeros(4), "key": jax.random.key_data(jax.random.key(0))},
    ]
    assert set(tree_digest(base)) == {"x", "key"}
    assert state_hash(base) == state_hash(
        {"key": jax.random.key(0), "x": np.zeros(4, np.float32)}
    )
    assert len({state_hash(t) for t in [base, *others]}) == len(others) + 1


def test_nan_payloads_are_part_of_the_state():
    quiet, other = (np.array([bits], np.uint32).view(np.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert state_hash({"x": quiet}) != state_hash({"x": other})


class Twins:
    """A node whose two children have the same printed key."""


jax.tree_util.register_pytree_with_keys(
    Twins,
    lambda _: (((jax.tree_util.DictKey(1), np.ones(1)), (jax.tree_util.DictKey("1"), np.zeros(1))), None),
    lambda _, children: Twins(),
)


def test_ambiguous_paths_are_refused():
    with pytest.raises(ValueError, match="share the path 'x/1'"):
        tree_digest({"x": Twins()})
