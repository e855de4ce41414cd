"""Every test runs offline on CPU with 8 simulated devices, strict rank promotion and a compilation cache that a second run reuses."""

import itertools
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Threads of eight devices on two busy cores may meet late at a collective, where XLA would abort the process after 40 seconds. (Programs of several
# devices are never read from the compilation cache: distributed.make_mesh.)
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    # Programs run for a moment, compiling takes longer.
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120", "--xla_cpu_collective_call_terminate_timeout_seconds=600",
]).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

MOST_MAPPINGS = 20_000  # of 65 530 that Linux gives a process; beyond, XLA dies of a segmentation fault
_tests = itertools.count()


@pytest.fixture(autouse=True)
def _forget_programs():
    """Every compiled program keeps a few memory mappings, and one process compiles thousands of them here: they are dropped now and then."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(_tests) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
