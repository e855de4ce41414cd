"""The table of slices: what the tools call them, and what does not exist."""

import math

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.launch.topologies import GENERATIONS, Topology, parse, shapes

EVERY = [Topology(generation, shape) for name, generation in GENERATIONS.items() for shape in shapes(name)]


@pytest.mark.parametrize(
    ("name", "accelerator", "xpk_type", "chips", "hosts", "gke_hosts"),
    [
        ("v5e:1x1", "v5litepod-1", "v5litepod-1", 1, 1, 1),
        ("v5e:2x4", "v5litepod-8", "v5litepod-8", 8, 1, 2),
        ("v5e:4x4", "v5litepod-16", "v5litepod-16", 16, 4, 4),
        ("v5e:16x16", "v5litepod-256", "v5litepod-256", 256, 64, 64),
        ("v6e:2x4", "v6e-8", "v6e-8", 8, 1, 2),
        ("v6e:16x16", "v6e-256", "v6e-256", 256, 64, 64),
        ("v5p:2x2x1", "v5p-8", "v5p-2x2x1", 4, 1, 1),
        ("v5p:4x4x4", "v5p-128", "v5p-4x4x4", 64, 16, 16),
        ("v5p:8x8x16", "v5p-2048", "v5p-8x8x16", 1024, 256, 256),
        ("v4:2x2x4", "v4-32", "v4-2x2x4", 16, 4, 4),
        ("v4:12x16x16", "v4-6144", "v4-12x16x16", 3072, 768, 768),
    ],
)
def test_names_and_sizes(name, accelerator, xpk_type, chips, hosts, gke_hosts):
    one = parse(name)
    assert (one.accelerator, one.xpk_type, one.chips, one.hosts, one.gke_hosts) == (accelerator, xpk_type, chips, hosts, gke_hosts)


def test_names_are_read_back_and_hosts_divide_the_chips():
    assert len({one.name for one in EVERY}) == len(EVERY) > 400
    for one in EVERY:
        assert parse(one.name) == one
        assert one.chips % one.hosts == 0 and one.chips // one.hosts in (1, 4, 8)
        assert list(one.shape) == sorted(one.shape) or one.name in ("v4:2x2x1", "v5p:2x2x1")


def test_a_size_stands_for_one_shape():
    for generation in GENERATIONS.values():
        sizes = {math.prod(shape) for shape in shapes(generation.name)}
        usual = [one for one in EVERY if one.generation is generation and one.usual]
        assert sorted(one.chips for one in usual) == sorted(sizes)
    assert parse("v5p:4x8x8").usual and not parse("v5p:4x4x16").usual


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e:4x5", "v5e:4x4"), ("v5e:4x4x4", "v5e:8x8"), ("v6e:16x8", "v6e:8x16"), ("v5p:4x8x4", "v5p:4x4x8"), ("v5p:16x16x28", "v5p:16x16x24"),
        ("v4:2x2", "v4:2x2x1"), ("v5e:32x32", "v5e:16x16"), ("v5r:4x4", "did you mean 'v5"), ("tpu:4x4", "v4, v5e, v5p, v6e"),
        ("v5e", "like v5e:4x4"), ("v5p:64", "like v5p:2x2x4"), ("v5e:0x4", "v5e:1x1"), ("", "v5e:4x4"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest(name, said):
    with pytest.raises(UserError, match="--topology") as caught:
        parse(name)
    assert said in str(caught.value) and "\n" not in str(caught.value)
