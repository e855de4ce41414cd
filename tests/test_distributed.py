"""The mesh: what a config may ask for, what is left is filled in, and one sentence for what does not match. Rows become global arrays."""

from __future__ import annotations

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
    assert distributed.is_lead() and distributed.host() == (0, 1) and not jax.distributed.is_initialized()
