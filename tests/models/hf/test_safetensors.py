"""The format against its library, both ways; a damaged file is one sentence; nothing half-written stays."""

from __future__ import annotations

import hashlib
import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.flax import load_file, save_file

from rlhf_jax.errors import UserError
from rlhf_jax.models.hf import safetensors as own
from tests.models.hf.invented import write_file

RNG = np.random.default_rng(0)
SHAPES = {"matrix": (3, 5), "vector": (7,), "scalar": (), "empty": (0, 4), "one": (1,), "deep": (2, 3, 4)}
DTYPES = [np.float32, np.float16, jnp.bfloat16]


def arrays(dtype):
    return {name: np.asarray(RNG.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


def same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_is_written_here(tmp_path, dtype):
    given = arrays(dtype)
    write_file(tmp_path / "x.safetensors", given)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == given.keys()
    for name in given:
        same_bits(np.asarray(read[name]), given[name])
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_library_writes_is_read_here(tmp_path, dtype):
    given = arrays(dtype)
    save_file({name: jnp.asarray(x) for name, x in given.items()}, tmp_path / "x.safetensors", metadata={"format": "flax"})
    tensors = own.read_header(tmp_path / "x.safetensors")
    assert tensors.keys() == given.keys() and own.read_metadata(tmp_path / "x.safetensors") == {"format": "flax"}
    for name in given:
        same_bits(tensors[name].read(), given[name])
        assert b"".join(tensors[name].blocks()) == given[name].tobytes()


def test_mixed_dtypes_lie_aligned_and_in_order(tmp_path):
    given = {"a": np.ones(3, np.float16), "b": np.ones(3, np.float64), "c": np.ones(5, np.float32), "d": np.ones(1, np.float16)}
    write_file(tmp_path / "x.safetensors", given)
    tensors = own.read_header(tmp_path / "x.safetensors")
    assert list(tensors) == ["b", "c", "a", "d"]
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in tensors.values())
    for name, array in given.items():
        same_bits(tensors[name].read(), array)
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="np") as file:
        for name, array in given.items():
            same_bits(file.get_tensor(name), array)


@pytest.mark.parametrize("block", [1, 64, 1 << 24])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_a_cast_in_blocks_is_the_cast(tmp_path, monkeypatch, block, dtype):
    monkeypatch.setattr(own, "BLOCK", block)
    given = {"x": RNG.normal(size=(13, 5)).astype(np.float32), "turned": RNG.normal(size=(9, 4, 3)).astype(np.float32).T, "s": np.float32(0.1)}
    digest = write_file(tmp_path / "x.safetensors", given, dtype)
    tensors = own.read_header(tmp_path / "x.safetensors")
    for name, array in given.items():
        same_bits(tensors[name].read(), np.ascontiguousarray(array).astype(dtype).reshape(array.shape))
        assert b"".join(tensors[name].blocks()) == tensors[name].read().tobytes()
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


def test_a_finite_value_beyond_float16_is_refused_and_an_infinity_is_kept(tmp_path):
    write_file(tmp_path / "x.safetensors", {"x": np.array([np.inf, -np.inf, np.nan, 65504], np.float32)}, np.float16)
    np.testing.assert_array_equal(own.read_header(tmp_path / "x.safetensors")["x"].read(), np.array([np.inf, -np.inf, np.nan, 65504], np.float16))
    with pytest.raises(UserError, match="tensor 'y' holds values beyond the range of float16: export it as bfloat16 or float32"):
        write_file(tmp_path / "y.safetensors", {"y": np.array([1e5], np.float32)}, np.float16)


def test_a_failure_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "x.safetensors"
    write_file(path, {"x": np.ones(3, np.float32)})
    before = path.read_bytes()

    def fails():
        raise RuntimeError("the disk of the source is gone")

    outputs = [own.Output("x", np.dtype(np.float32), (3,), lambda: np.zeros(3, np.float32)), own.Output("y", np.dtype(np.float32), (3,), fails)]
    with pytest.raises(RuntimeError, match="gone"):
        own.write(path, outputs)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_output_that_is_not_as_announced_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="announced as"):
        own.write(tmp_path / "x.safetensors", [own.Output("x", np.dtype(np.float32), (3,), lambda: np.zeros(4, np.float32))])
    with pytest.raises(ValueError, match="two tensors are named 'x'"):
        own.write(tmp_path / "x.safetensors", [own.Output("x", np.dtype(np.float32), (1,), lambda: np.zeros(1, np.float32))] * 2)


@pytest.mark.parametrize("kind", sorted(set(own.BITS) - set(own.FLOATS)))
def test_types_that_are_not_floating_point_are_listed_and_not_read(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    size = 8 * own.BITS[kind] // 8
    path.write_bytes(packed({"x": {"dtype": kind, "shape": [2, 4], "data_offsets": [0, size]}}, bytes(size)))
    tensor = own.read_header(path)["x"]
    assert (tensor.kind, tensor.shape, tensor.size, tensor.readable) == (kind, (2, 4), size, False)
    with pytest.raises(UserError, match=f"{path}: tensor 'x' is {kind}, and only F64, F32, F16, BF16 can be read"):
        tensor.read()


# --- damage ---


def packed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = packed({"x": entry()}, bytes(8))
DAMAGED = {
    "nothing": (b"", "it has 0 bytes"),
    "five bytes": (b"12345", "it has 5 bytes"),
    "a giant header": (struct.pack("<Q", 100_000_001) + bytes(64), "its header would have 100000001 bytes"),
    "a header beyond the end": (struct.pack("<Q", 100) + b"{}", "its header has 100 bytes and the whole file 10, so it is truncated"),
    "no JSON": (packed(b"{x}"), "its header cannot be parsed"),
    "no text": (packed(b"\xff\xfe{}"), "its header cannot be parsed"),
    "nested without end": (packed(b"[" * 100_000), "its header cannot be parsed"),
    "a list": (packed([]), "its header is not an object of tensors"),
    "the same name twice": (packed(b'{%s,%s}' % ((b'"x":' + json.dumps(entry()).encode(),) * 2), bytes(8)), "the name 'x' is there twice"),
    "metadata of numbers": (packed({"__metadata__": {"a": 1}}), "__metadata__ is not a mapping from text to text"),
    "an entry that is none": (packed({"x": 3}), "tensor 'x' is not described by dtype, shape and data_offsets"),
    "an entry without shape": (packed({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "tensor 'x' is not described"),
    "an unknown dtype": (packed({"x": entry("F31")}, bytes(8)), "tensor 'x' has the unknown dtype 'F31'"),
    "a dtype that is a list": (packed({"x": entry([])}, bytes(8)), r"tensor 'x' has the unknown dtype \[\]"),
    "a negative size": (packed({"x": entry(shape=(-2,))}, bytes(8)), r"the shape \[-2\], which is no list of sizes"),
    "a fractional size": (packed({"x": entry(shape=(2.0,))}, bytes(8)), r"the shape \[2.0\], which is no list of sizes"),
    "a true size": (packed({"x": entry(shape=(True,), offsets=(0, 4))}, bytes(4)), r"the shape \[True\], which is no list of sizes"),
    "offsets backwards": (packed({"x": entry(offsets=(8, 0))}, bytes(8)), r"the data_offsets \[8, 0\], which are no range"),
    "three offsets": (packed({"x": entry(offsets=(0, 4, 8))}, bytes(8)), r"the data_offsets \[0, 4, 8\]"),
    "a size that is not shape × dtype": (packed({"x": entry(shape=(3,))}, bytes(8)), r"F32 \[3\] takes 12 bytes and its data_offsets span 8"),
    "half a byte": (packed({"x": entry("F4", (3,), (0, 1))}, bytes(1)), "takes 1.5 bytes and its data_offsets span 1"),
    "truncated data": (GOOD[:-1], f"describes {len(GOOD)} bytes and the file has {len(GOOD) - 1}, so it is truncated"),
    "more data": (GOOD + b"\0", f"describes {len(GOOD)} bytes and the file has {len(GOOD) + 1}, with bytes after the last tensor"),
    "overlap": (packed({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)), "tensor 'y' overlaps the tensor before it"),
    "a hole": (packed({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20)), "tensor 'y' leaves 4 bytes unused before it"),
    "a hole at the start": (packed({"x": entry(offsets=(4, 12))}, bytes(12)), "tensor 'x' leaves 4 bytes unused before it"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_sentence_and_refused_by_the_library_too(tmp_path, name):
    content, phrase = DAMAGED[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=phrase) as error:
        own.read_header(path)
    assert str(error.value).startswith(f"{path} is not an intact safetensors file: ") and str(error.value).endswith("; download or export it again")
    if name != "the same name twice":  # the format forbids it; the library takes the last
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(path, framework="np").__enter__()


def test_the_undamaged_file_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    np.testing.assert_array_equal(own.read_header(path)["x"].read(), np.zeros(2, np.float32))
    path.write_bytes(packed({}))
    assert own.read_header(path) == {} and own.read_metadata(path) == {}


def test_whatever_is_accepted_the_library_accepts_with_the_same_tensors(tmp_path):
    """Bytes of the header are changed at random; most files are refused, and the ones that are not mean the same to both."""
    rng = np.random.default_rng(0)
    path = tmp_path / "model.safetensors"
    write_file(path, {"a": np.ones((2, 3), np.float16), "b": np.ones(4, np.float32)})
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    accepted = 0
    for _ in range(400):
        content = bytearray(good)
        content[8 + rng.integers(length)] = rng.choice(list(b'0123456789abFB,:[]{}" '))
        path.write_bytes(content)
        try:
            tensors = own.read_header(path)
        except UserError:
            continue
        accepted += 1
        with safetensors.safe_open(path, framework="np") as file:
            assert set(file.keys()) == set(tensors)
            for name, tensor in tensors.items():
                assert file.get_slice(name).get_shape() == list(tensor.shape) and file.get_slice(name).get_dtype() == tensor.kind
    assert 10 < accepted < 300


def test_what_is_no_file_or_no_weights_is_one_sentence(tmp_path):
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(UserError, match=f"{pointer} is a Git LFS pointer and not the weights: run `git lfs pull`"):
        own.read_header(pointer)
    with pytest.raises(UserError, match=r"gone.safetensors cannot be read \(No such file or directory\)"):
        own.read_header(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        own.read_header(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    tensor = own.read_header(path)["x"]
    path.write_bytes(GOOD[:-1])
    with pytest.raises(UserError, match="was cut short while it was read: tensor 'x' is not all there"):
        tensor.read()
