"""Adapters: what they compute, by a loop; what they leave alone; what they cost; how they merge."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import distributed, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, Networks, NetworkSpec, layers, layout, lora, transformer
from rlhf_jax.models.config import Lora
from rlhf_jax.models.lazy import Lazy
from rlhf_jax.models.networks import merge
from rlhf_jax.train.start import split
from rlhf_jax.types import Array, PyTree
from tests.models import tiny

EVERYWHERE = "query|key|value|output|gate|up|down"
KINDS = {
    "lora": Lora(rank=3, alpha=4.0, targets=EVERYWHERE),
    "rslora": Lora(rank=3, alpha=2.0, targets=EVERYWHERE, rslora=True),
    "dora": Lora(rank=3, alpha=4.0, targets=EVERYWHERE, dora=True),
}


def config(settings: Lora | None, **changes: Any) -> ModelConfig:
    return tiny.config(**{"lora": settings, "layers": 1, **changes})


def is_adapter(path: str) -> bool:
    return re.search(lora.TRAINABLE, path) is not None


def halves(params: PyTree) -> tuple[PyTree, PyTree]:
    return split(params, is_adapter)


@functools.cache
def params(settings: Lora | None, **changes: Any) -> PyTree:
    """Drawn without a compiler, canonical: kernels of unit gain, norms' gains near 1, updates of their kernel's size, magnitudes near the norms."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key in ("scale", lora.MAGNITUDE):
            return 1.0 + 0.3 * noise
        return noise * {lora.A: 0.5, lora.B: 0.5}.get(path[-1].key, leaf.shape[0] ** -0.5)

    shapes = jax.eval_shape(functools.partial(transformer.init, config(settings, **changes)), jax.random.key(0))
    # Adapters last: the same base for all settings.
    order = sorted(jax.tree_util.tree_leaves_with_path(shapes), key=lambda item: item[0][-1].key in lora.LEAVES)
    made = {path: jnp.asarray(draw(path, leaf)) for path, leaf in order}
    return jax.tree_util.tree_map_with_path(lambda path, _: made[path], shapes)


# --- one kernel, by loops ---


class Case:
    """y = x W with an adapter, in float64 NumPy, one output at a time."""

    def __init__(self, settings: Lora, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.settings, self.x, self.kernel = settings, rng.normal(size=(5, 6)), rng.normal(size=(6, 4))
        self.a, self.b, self.m = rng.normal(size=(6, settings.rank)), rng.normal(size=(settings.rank, 4)), 1.0 + rng.random(4)

    def column(self, out: int, a: np.ndarray, b: np.ndarray) -> list[float]:
        s = self.settings.alpha / (self.settings.rank**0.5 if self.settings.rslora else self.settings.rank)
        return [self.kernel[i, out] + s * sum(a[i, r] * b[r, out] for r in range(self.settings.rank)) for i in range(6)]

    def norms(self, a: np.ndarray, b: np.ndarray) -> list[float]:
        return [sum(w * w for w in self.column(out, a, b)) ** 0.5 for out in range(4)]

    def outputs(self, a: np.ndarray, b: np.ndarray, m: np.ndarray, norms: list[float]) -> np.ndarray:
        y = np.zeros((5, 4))
        for t in range(5):
            for out in range(4):
                y[t, out] = sum(x * w for x, w in zip(self.x[t], self.column(out, a, b)))
                y[t, out] *= m[out] / norms[out] if self.settings.dora else 1.0
        return y

    def leaves(self) -> dict[str, Array]:
        names = (lora.A, lora.B, *((lora.MAGNITUDE,) if self.settings.dora else ()))
        return {"kernel": jnp.float32(self.kernel)} | {name: jnp.float32(x) for name, x in zip(names, (self.a, self.b, self.m))}

    def ours(self, leaves: PyTree) -> Array:
        linear = layers.Linear(config(self.settings), 4, (None, None), name="up")
        return linear.apply({"params": leaves}, jnp.float32(self.x)[None])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_equation(kind: str) -> None:
    case = Case(KINDS[kind])
    expected = case.outputs(case.a, case.b, case.m, case.norms(case.a, case.b))
    np.testing.assert_allclose(case.ours(case.leaves()), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_equation(kind: str) -> None:
    """Central differences, in float64, of the form whose norms are held fixed; DoRA's other derivative, through the norms, is far from it."""
    case = Case(KINDS[kind])
    weights = np.random.default_rng(1).normal(size=(5, 4))
    grads = jax.grad(lambda leaves: (case.ours(leaves) * jnp.float32(weights)).sum())(case.leaves())
    fixed = case.norms(case.a, case.b)

    def slope(name: str, index: tuple[int, ...], norms: list[float] | None) -> float:
        values = []
        for step in (1e-6, -1e-6):
            point = {lora.A: case.a.copy(), lora.B: case.b.copy(), lora.MAGNITUDE: case.m.copy()}
            point[name][index] += step
            a, b, m = point.values()
            values.append((case.outputs(a, b, m, case.norms(a, b) if norms is None else norms) * weights).sum())
        return (values[0] - values[1]) / 2e-6

    gaps = []
    for name in (lora.A, lora.B, *((lora.MAGNITUDE,) if KINDS[kind].dora else ())):
        for index in np.ndindex(grads[name].shape):
            assert grads[name][index] == pytest.approx(slope(name, index, fixed), rel=1e-4, abs=1e-4)
            gaps.append(abs(float(grads[name][index]) - slope(name, index, None)))
    assert (max(gaps) > 0.1) == KINDS[kind].dora


def test_a_column_of_zeros_has_a_finite_gradient() -> None:
    case = Case(KINDS["dora"])
    case.kernel[:, 1], case.b[:], case.m[1] = 0.0, 0.0, 0.0
    out, grads = jax.value_and_grad(lambda leaves: jnp.square(case.ours(leaves)).sum())(case.leaves())
    assert np.isfinite(out) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_magnitudes_move_in_bfloat16() -> None:
    """A factor of 1.002 is none that bfloat16 has."""
    case = Case(KINDS["dora"])
    case.b[:] = 0.0
    leaves = case.leaves() | {lora.MAGNITUDE: 1.002 * lora.column_norms(jnp.float32(jnp.bfloat16(case.kernel)))}
    linear = layers.Linear(config(KINDS["dora"], compute_dtype="bfloat16"), 4, (None, None), name="up")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2000, 6)), jnp.bfloat16)
    ratio = np.float32(linear.apply({"params": leaves}, x)) / np.float32(x @ jnp.bfloat16(case.kernel))
    assert np.mean(ratio) == pytest.approx(1.002, abs=5e-4)


# --- fresh ones ---


@functools.cache
def fresh(settings: Lora | None) -> PyTree:
    return jax.jit(transformer.init, static_argnums=0, compiler_options=tiny.SHIPPED)(config(settings, layers=2), jax.random.key(3))


def test_fresh_adapters_change_nothing() -> None:
    """Nor what is drawn beside them. LoRA's logits are the base's to the bit; DoRA divides a norm by itself."""
    seqs, drawn, plain = tiny.rows(3, 9), fresh(KINDS["dora"]), fresh(None)
    jax.tree.map(np.testing.assert_array_equal, halves(drawn)[1], plain)
    expected = tiny.logits(config(None, layers=2), plain, seqs)
    np.testing.assert_array_equal(tiny.logits(config(KINDS["lora"], layers=2), drawn, seqs), expected)  # magnitudes are not read
    np.testing.assert_allclose(tiny.logits(config(KINDS["dora"], layers=2), drawn, seqs), expected, atol=1e-5)


def test_first_values() -> None:
    """A is uniform in ±1/√in, B zero, magnitudes the kernels' norms; no two A's are drawn alike."""
    drawn, seen = fresh(KINDS["dora"])["layers"], []
    for path in lora.kernels(config(None, layers=2)):
        _, layer, name = path.split("/")
        node, bound = drawn[layer][name], drawn[layer][name]["kernel"].shape[0] ** -0.5
        assert 0.8 * bound < np.abs(node[lora.A]).max() <= bound and np.std(node[lora.A]) == pytest.approx(bound / 3**0.5, rel=0.25)
        assert not node[lora.B].any()
        np.testing.assert_allclose(node[lora.MAGNITUDE], np.linalg.norm(node["kernel"], axis=0), rtol=1e-5)
        seen.append(float(node[lora.A][0, 0] / bound))
    assert len(set(seen)) == len(seen)


def test_a_pattern_chooses_projections() -> None:
    everything = set(EVERYWHERE.split("|"))
    for targets, names in (("query|value", {"query", "value"}), ("^(up|down)$", {"up", "down"}), ("y$", {"query", "key"}), (".", everything)):
        settings = Lora(rank=2, alpha=2.0, targets=targets)
        assert set(settings.projections) == names
        shapes = jax.eval_shape(functools.partial(transformer.init, config(settings)), jax.random.key(0))
        found = {path[2].key for path, _ in jax.tree_util.tree_leaves_with_path(shapes) if path[-1].key == lora.A}
        assert found == names
    with pytest.raises(UserError, match=r"config.lora.targets = 'q_proj' is found in none of query, key"):
        Lora(rank=2, alpha=2.0, targets="q_proj")


EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_mlp": 8, "dense": (True, False)}
OTHERS: dict[str, dict[str, Any]] = {"llama": {}, "ungated": {"gated": False, "kv_heads": 4}, "experts": EXPERTS}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_kernels_are_those_of_the_network(changes: dict[str, Any]) -> None:
    """…with an adapter beside each, and beside nothing else."""
    shapes = jax.eval_shape(functools.partial(transformer.init, config(KINDS["lora"], **{"layers": 2, **changes})), jax.random.key(0))
    leaves = {"/".join(entry.key for entry in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    beside = {path.rpartition("/")[0] for path in leaves if is_adapter(path)}
    assert lora.kernels(config(None, **{"layers": 2, **changes})) == {path: leaves[f"{path}/kernel"] for path in beside}


def test_alike_settings_mean_the_same_leaves() -> None:
    one = Lora(rank=2, alpha=4.0, targets="query|value", dropout=0.1)
    assert one.alike(Lora(rank=2, alpha=4.0, targets="^(value|query)$"))
    for other in (None, *(dataclasses.replace(one, **change) for change in ({"rank": 3}, {"alpha": 2.0}, {"targets": "query"}, {"dora": True},
                                                                           {"rslora": True}))):
        assert not one.alike(other)


# --- in a network ---


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_merged_is_unmerged(kind: str) -> None:
    settings = KINDS[kind]
    found = lora.merged(params(settings), settings)
    assert not lora.has_adapters(found) and lora.has_adapters(params(settings))
    assert isinstance(found["layers"]["0"]["up"]["kernel"], Lazy)  # nothing is computed yet
    seqs = tiny.rows(3, 9)
    unmerged = tiny.logits(config(settings), params(settings), seqs)
    assert np.abs(unmerged - tiny.logits(config(None), halves(params(settings))[1], seqs)).max() > 0.1
    np.testing.assert_allclose(tiny.logits(config(None), jax.tree.map(np.asarray, found), seqs), unmerged, atol=1e-5)


def test_a_merged_kernel_keeps_its_dtype() -> None:
    case = Case(KINDS["dora"])
    leaves = case.leaves() | {"kernel": jnp.bfloat16(case.kernel), "bias": np.ones(4, np.float32)}
    found = lora.merged({"up": leaves}, KINDS["dora"])["up"]
    assert found["kernel"].dtype == np.asarray(found["kernel"]).dtype == jnp.bfloat16 and found.keys() == {"kernel", "bias"}
    whole = np.array([case.column(out, case.a, case.b) for out in range(4)]).T
    np.testing.assert_allclose(np.float32(found["kernel"]), whole / np.linalg.norm(whole, axis=0) * case.m, rtol=0.02, atol=0.02)


def test_scanned_is_unrolled() -> None:
    """With dropout: its draws belong to a layer and a projection, however layers run."""
    settings = dataclasses.replace(KINDS["dora"], dropout=0.5)
    seqs, keys = tiny.rows(3, 9), jax.random.split(jax.random.key(0), 3)
    unrolled, scanned = config(settings, layers=2), config(settings, layers=2, scan_layers=True)
    drawn = params(settings, layers=2)
    assert scanned.unit == 1
    found = tiny.logits(scanned, layout.to_runtime(drawn, scanned.unit), seqs, keys)
    np.testing.assert_allclose(found, tiny.logits(unrolled, drawn, seqs, keys), atol=1e-5)


def test_dropout_belongs_to_rows() -> None:
    """A row's draw depends on its key alone; without keys there is none; fresh adapters have nothing to drop."""
    settings = dataclasses.replace(KINDS["dora"], dropout=0.5)
    c, seqs, keys = config(settings), tiny.rows(4, 9), jax.random.split(jax.random.key(0), 4)
    drawn = params(settings)
    whole, order = tiny.logits(c, drawn, seqs, keys), np.array([2, 0, 3, 1])
    moved = tiny.logits(c, drawn, jax.tree.map(lambda x: x[order], seqs), keys[order])
    np.testing.assert_allclose(moved, whole[order], atol=1e-5)
    assert np.abs(whole - tiny.logits(c, drawn, seqs, keys[order])).max() > 0.1
    none = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if path[-1].key == lora.B else x, drawn)
    np.testing.assert_array_equal(tiny.logits(c, none, seqs, keys), tiny.logits(c, none, seqs))


def test_every_projection_draws_its_own_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    salts = []
    monkeypatch.setattr(layers, "drop", lambda x, keys, salt, rate: salts.append(int(salt)) or x)
    settings = dataclasses.replace(KINDS["lora"], dropout=0.5)
    c, seqs = config(settings, layers=2), tiny.rows(1, 4)
    keys = jax.random.split(jax.random.key(0), 1)
    jax.eval_shape(functools.partial(transformer.trunk, c), params(settings, layers=2), seqs.tokens, seqs.positions, seqs.segment_ids, keys)
    mine = {salt for salt in salts if salt >= layers.ADAPTERS}
    assert len(mine) == len(lora.kernels(c)) and max(mine) < layers.NOISE


def test_cached_is_whole() -> None:
    seqs, length = tiny.row(np.arange(1, 8)), 7
    c, drawn = config(KINDS["dora"]), params(KINDS["dora"])
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    step = functools.partial(tiny.jit(transformer.cached, static_argnums=0), c, drawn)
    first, cache = step(seqs.tokens[:, :4], seqs.positions[:, :4], mask[:, :4], transformer.empty_cache(c, 1, length), 0)
    hidden = [first]
    for t in range(4, length):
        one, cache = step(seqs.tokens[:, t : t + 1], seqs.positions[:, t : t + 1], mask[:, t : t + 1], cache, t)
        hidden.append(one)
    whole = transformer.unembed(c, drawn, jnp.concatenate(hidden, 1))
    np.testing.assert_allclose(whole, tiny.logits(c, drawn, seqs), atol=1e-5)


# --- trained apart ---


def nll(c: ModelConfig, frozen: PyTree, trained: PyTree, seqs: Any) -> Array:
    return -Networks({"policy": trained}, {"base": {"policy": frozen}}, NetworkSpec(policy=c)).policy(seqs).logps.sum()


def test_gradients_are_of_adapters_alone() -> None:
    """…and are those that the whole tree gives."""
    c, seqs = config(KINDS["dora"]), tiny.rows(3, 9)
    trained, frozen = halves(params(KINDS["dora"]))
    grads = tiny.jit(jax.grad(functools.partial(nll, c), argnums=1))(frozen, trained, seqs)
    assert jax.tree.structure(grads) == jax.tree.structure(trained) and all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    tiny.near(grads, halves(tiny.jit(jax.grad(functools.partial(nll, c, {})))(merge(trained, frozen), seqs))[0])


def test_the_reference_is_free() -> None:
    """With fresh adapters at the start, frozen["ref"] has no leaves, and the reference is the base whatever the adapters have become."""
    c, seqs = config(KINDS["dora"]), tiny.rows(3, 9)
    trained, frozen = halves(params(KINDS["dora"]))
    base = Networks({"policy": frozen}, {}, NetworkSpec(policy=config(None)))
    expected = tiny.jit(lambda nets: nets.policy(seqs).logps)(base)
    both = tiny.jit(lambda nets: (nets.ref(seqs).logps, nets.policy(seqs).logps))
    for now in (trained, jax.tree.map(lambda x: x + 1.0, trained)):
        ref, policy = both(Networks({"policy": now}, {"base": {"policy": frozen}, "ref": {}}, NetworkSpec(policy=c)))
        np.testing.assert_array_equal(ref, expected)
        assert np.abs(policy - expected).max() > 0.1


@pytest.mark.slow
def test_sharded_is_one_device() -> None:
    """Loss and gradients on eight devices, fsdp × tensor × data."""
    c, seqs = config(KINDS["dora"], layers=2, scan_layers=True), tiny.rows(8, 6)
    running = layout.to_runtime(params(KINDS["dora"], layers=2), c.unit)
    trained, frozen = halves(running)
    program = lambda frozen, trained: nll(c, frozen, trained, seqs)  # noqa: E731
    expected = tiny.jit(jax.value_and_grad(program, argnums=1))(frozen, trained)
    on = distributed.make_mesh({axis: 2 if axis in ("data", "fsdp", "tensor") else 1 for axis in distributed.AXES}, 0)
    where = sharding.parameter_shardings(on, transformer.logical_axes(c), running)
    (layer,) = where["layers"][layout.SCAN].values()
    assert tuple(layer["down"][lora.A].spec) == (None, "tensor", None) and tuple(layer["down"][lora.B].spec) == (None, None, "fsdp")
    with tiny.uncached():
        placed = jax.device_put((frozen, trained), halves(where)[::-1])
        found = sharding.jit(jax.value_and_grad(program, argnums=1), on).lower(*placed).compile(tiny.QUICK)(*placed)
    tiny.near(found, expected)


def test_merging_partial_trees_gives_the_whole() -> None:
    whole = params(KINDS["dora"])
    trained, frozen = halves(whole)
    assert jax.tree.structure(merge(trained, frozen)) == jax.tree.structure(whole)
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)} == set(lora.LEAVES)
    assert not lora.has_adapters(frozen)
