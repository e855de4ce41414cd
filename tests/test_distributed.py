"""The mesh: what a config may ask for, what is left is filled in, and one sentence for what does not match. Rows become global arrays."""

from __future__ import annotations

import itertools
import types
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from rlhf_jax import distributed, sharding
from rlhf_jax.errors import UserError
from tests.models import tiny


@pytest.fixture(autouse=True, scope="module")
def _uncached():
    with tiny.uncached():
        yield


def sizes(data: int, fsdp: int, tensor: int, expert: int = 1, sequence: int = 1) -> dict[str, int]:
    return {"data": data, "fsdp": fsdp, "expert": expert, "sequence": sequence, "tensor": tensor}


@pytest.mark.parametrize(
    ("asked", "devices", "shape"),
    [
        ((8, 1, 1), 0, (8, 1, 1, 1, 1)), ((-1, 1, 1), 0, (8, 1, 1, 1, 1)), ((1, -1, 2), 0, (1, 4, 1, 1, 2)), ((2, 2, -1), 0, (2, 2, 1, 1, 2)),
        ((1, -1, 1), 4, (1, 4, 1, 1, 1)), ((1, 1, 1), 1, (1, 1, 1, 1, 1)), ((2, 4, -1), 0, (2, 4, 1, 1, 1)), ((1, -1, 2, 2), 0, (1, 2, 2, 1, 2)),
        ((1, -1, 1, 1, 4), 0, (1, 2, 1, 4, 1)),
    ],
)
def test_a_mesh_has_the_sizes_asked_for_and_minus_one_takes_what_is_left(asked, devices, shape):
    mesh = distributed.make_mesh(sizes(*asked), devices)
    assert mesh.axis_names == distributed.AXES and mesh.devices.shape == shape
    assert list(mesh.devices.ravel()) == jax.devices()[: devices or 8]
    assert mesh.axis_types == (AxisType.Auto,) * 5


def test_a_mesh_may_be_made_of_devices_that_are_named():
    named = jax.devices()[5:1:-1]
    assert list(distributed.make_mesh(sizes(1, -1, 2), available=named).devices.ravel()) == named
    assert list(distributed.make_mesh(sizes(1, 2, 1), 2, named).devices.ravel()) == named[:2]
    with pytest.raises(UserError, match=r"config\.mesh\.devices = 5, but 4 are here"):
        distributed.make_mesh(sizes(1, 5, 1), 5, named)


def chips(*cube: int, slices: int = 1) -> list[Any]:
    """What JAX says of the chips of TPU slices, in the order of hosts with 2 × 2 chips each."""
    x, y, z = cube
    at = sorted(itertools.product(range(x), range(y), range(z)), key=lambda c: (c[2], c[1] // 2, c[0] // 2, c[1], c[0]))
    return [types.SimpleNamespace(id=n + s * len(at), platform="tpu", device_kind="TPU v5", coords=c, core_on_chip=0, slice_index=s)
            for s in range(slices) for n, c in enumerate(at)]


def test_on_a_torus_the_last_axes_are_neighbours():
    found = distributed.arranged(chips(4, 4, 4), [1, 16, 1, 4], 1)
    assert found.shape == (1, 16, 1, 4)
    for ring in found.reshape(16, 4):  # each a ring of four along one axis of the torus
        assert sum(len({chip.coords[i] for chip in ring}) > 1 for i in range(3)) == 1
    assert distributed.arranged(chips(4, 2, 1), [2, 2, 1, 2], 1).size == 8  # an axis of the torus may be split
    assert [chip.id for chip in distributed.arranged(chips(4, 2, 1)[:4], [1, 4, 1, 1], 1, whole=False).ravel()] == [0, 1, 2, 3]


def test_data_alone_goes_across_slices():
    found = distributed.arranged(chips(2, 2, 1, slices=2), [4, 1, 1, 2], 2)
    assert [{chip.slice_index for chip in part.ravel()} for part in found] == [{0}, {0}, {1}, {1}]
    simulated = distributed.make_mesh(sizes(4, 1, 2), slices=2)
    assert list(simulated.devices.ravel()) == jax.devices()
    with pytest.raises(UserError, match=r"config\.mesh\.data = 3 is no multiple of config\.mesh\.slices = 2"):
        distributed.make_mesh(sizes(3, 1, 1), 3, slices=2)
    for slices in (1, 4):
        with pytest.raises(UserError, match=rf"config\.mesh\.slices = {slices}, but the 8 chips here lie on 2: set it to 2"):
            distributed.arranged(chips(2, 2, 1, slices=2), [4, 1, 1, 2], slices)


@pytest.mark.parametrize(
    ("asked", "devices", "said"),
    [
        ((4, 1, 1), 0, r"data=4, fsdp=1, expert=1, sequence=1, tensor=1, which does not match the 8 devices here"),
        ((16, 1, 1), 0, r"does not match the 8 devices"),
        ((1, 1, 1), 0, r"does not match the 8 devices"),
        ((3, -1, 1), 0, r"data=3, fsdp=-1, expert=1, sequence=1, tensor=1, which does not match the 8 devices"),
        ((-1, -1, 1), 0, r"at most one is -1"),
        ((0, 8, 1), 0, r"sizes are positive"),
        ((-2, 1, 1), 0, r"sizes are positive"),
        ((1, 1, 1), 9, r"config\.mesh\.devices = 9, but 8 are here"),
        ((2, 1, 1), 4, r"does not match the 4 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_sentence(asked, devices, said):
    with pytest.raises(UserError, match=said):
        distributed.make_mesh(sizes(*asked), devices)


def test_rows_become_global_arrays_on_their_devices():
    mesh = distributed.make_mesh(sizes(2, 2, 2))
    rows = {"tokens": np.arange(24).reshape(8, 3), "real": np.arange(8) < 7}
    placed = distributed.to_global(rows, sharding.row_sharding(mesh))
    assert placed["tokens"].shape == (8, 3) and {s.data.shape for s in placed["tokens"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed["tokens"], rows["tokens"])
    np.testing.assert_array_equal(placed["real"], rows["real"])


def test_one_process_leads_and_needs_no_initialisation():
    distributed.initialize(False)
    assert distributed.is_lead() and distributed.hosts() == 1 and not jax.distributed.is_initialized()


# --- hosts; two processes are started in tests/train/test_hosts.py ---


HAND = (distributed.ADDRESS, distributed.PROCESSES, distributed.PROCESS)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("", "2", ""), r"JAX_NUM_PROCESSES is set, but JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID is not: set all three"),
        (("localhost:1", "", "0"), r"JAX_PROCESS_ID is set, but JAX_NUM_PROCESSES is not"),
        (("localhost:1", "two", "0"), r"JAX_NUM_PROCESSES = 'two': hosts are numbered from 0"),
        (("localhost:1", "2", "2"), r"JAX_PROCESS_ID = 2 and JAX_NUM_PROCESSES = 2: hosts are numbered from 0"),
    ],
)
def test_hosts_that_cannot_be_told_are_one_sentence(values, said, monkeypatch):
    for name, value in zip(HAND, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        distributed.initialize(True)
    assert not jax.distributed.is_initialized()


def test_a_cluster_that_jax_does_not_know_is_one_sentence(monkeypatch):
    def unknown(**given):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", unknown)
    for name in HAND:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"config\.mesh\.multihost = True, but JAX finds no other hosts .*set JAX_COORD"):
        distributed.initialize(True)


def test_hosts_by_hand_and_the_timeouts_reach_jax(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", given.update)
    for name, value in zip(HAND, ("10.0.0.1:99", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    distributed.initialize(True, 7)
    assert given == {"coordinator_address": "10.0.0.1:99", "num_processes": 4, "process_id": 3, "heartbeat_timeout_seconds": 7,
                     "shutdown_timeout_seconds": 7}
    given.clear()
    for name in HAND[1:]:
        monkeypatch.delenv(name)
    distributed.initialize(True, 7)  # a cluster's own way
    assert given == {"heartbeat_timeout_seconds": 7, "shutdown_timeout_seconds": 7}


def test_the_first_host_that_differs_is_named_with_what_differs():
    same = {"config": {"seed": 0, "run": {"steps": 4}}, "code": "a"}
    distributed.compare([same, dict(same)])
    with pytest.raises(UserError, match=r"host 2 of 3 differs from host 0 in config\.run\.steps \(5 there, 4 on host 0\): start every"):
        distributed.compare([same, same, {"config": {"seed": 0, "run": {"steps": 5}}, "code": "a"}])
    with pytest.raises(UserError, match=r"in code \('b' there, 'a' on host 0\), config\.run \(None there, .*\), config\.seed \(1 there, 0 on "):
        distributed.compare([same, {"config": {"seed": 1}, "code": "b"}])
    with pytest.raises(UserError, match=r"and 2 more: start"):
        distributed.compare([{name: 0 for name in "abcde"}, {name: 1 for name in "abcde"}])


def test_one_host_meets_itself():
    with distributed.meeting() as agree:
        agree({"config": 1})
    assert distributed.exchange({"a": [1]}) == [{"a": [1]}] and distributed.gathered(np.arange(2)).tolist() == [[0, 1]]
    with pytest.raises(UserError, match=r"^mine$"), distributed.meeting():
        raise UserError("mine")


def test_the_rows_of_one_host_are_all_rows_in_order():
    mesh = distributed.make_mesh(sizes(2, 2, 2))
    assert sharding.host_rows(mesh) == ((0, 1, 2, 3), 4) and sharding.host_rows(mesh, 1) == ((), 4)
    assert sharding.row_numbers(mesh, 8).tolist() == list(range(8))
    rows = np.arange(24).reshape(8, 3)
    placed = distributed.to_global(rows, sharding.row_sharding(mesh))
    np.testing.assert_array_equal(distributed.own_rows(placed), rows)
    np.testing.assert_array_equal(distributed.all_rows(placed), rows)
    (shape,) = jax.tree.leaves(sharding.global_shapes({"tokens": rows}, mesh))
    assert shape.shape == (8, 3) and shape.sharding == sharding.row_sharding(mesh)
