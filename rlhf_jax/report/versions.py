"""Which software and which devices made a result."""

from __future__ import annotations

import importlib.metadata
import platform

import jax

PACKAGES = ("rlhf-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "ml-collections", "chex", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of what the results depend on, the platform, and the devices."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    devices = jax.devices()
    return {**found, "platform": platform.platform(), "devices": f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})"}
