"""The platform is that of the devices for which a program is traced."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.ops import backends, partition


def test_the_platform_is_that_of_the_mesh_around():
    elsewhere = types.SimpleNamespace(devices=np.array([[types.SimpleNamespace(platform="tpu")]]))
    assert backends.platform() == jax.default_backend()
    with partition.axis_rules(elsewhere, {}):
        assert backends.platform() == "tpu"
        with partition.axis_rules(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)), {}):
            assert jax.jit(lambda x: x + (backends.platform() == "cpu"))(jnp.zeros(())) == 1.0
        assert backends.platform() == "tpu"
    assert backends.platform() == jax.default_backend()
