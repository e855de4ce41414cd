"""Out: the library reads what was exported, it comes in again to the bit, and a target is whole or untouched."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.flax import load_file

from rlhf_jax import distributed
from rlhf_jax.errors import UserError
from rlhf_jax.models.hf import export, safetensors
from rlhf_jax.models.hf.directory import INDEX, SUMS, open_directory
from rlhf_jax.models.hf.rows import same
from rlhf_jax.models.hf.tensors import read_params
from rlhf_jax.models.lazy import Lazy
from tests.models.hf.invented import CONFIG, CONFIG_JSON, ROWS, abstract, params, theirs


def write(folder, tree, **options):
    options = {"dtype": "float32", "config_json": CONFIG_JSON} | options
    export.write_directory(folder, options.pop("rows", ROWS), options.pop("config", CONFIG), tree, **options)


def again(folder, tree):
    """What comes in again, as NumPy."""
    return jax.tree.map(np.asarray, read_params(open_directory(folder, "x"), ROWS, CONFIG, abstract(tree)))


def identical(loaded, tree):
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b), strict=True), loaded, tree)


def files(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_file_as_the_library_reads_it(tmp_path, dtype):
    tree = params()
    write(tmp_path / "new" / "model", tree, dtype=dtype)
    folder = tmp_path / "new" / "model"
    assert files(folder) == [SUMS, "config.json", "model.safetensors"] and files(tmp_path / "new") == ["model"]
    read, expected = load_file(folder / "model.safetensors"), theirs(tree)
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(read[name]), array.astype(jnp.dtype(dtype)), strict=True)
    assert json.loads((folder / "config.json").read_text()) == CONFIG_JSON | {"torch_dtype": dtype, "dtype": dtype}
    if dtype == "float32":
        identical(again(folder, tree), tree)


def test_shards_follow_the_table_and_the_index_names_them(tmp_path):
    tree = params()
    limit = 1000
    write(tmp_path / "out", tree, shard_bytes=limit)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    expected = theirs(tree)
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)] and len(shards) > 3
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    assert files(tmp_path / "out") == sorted([SUMS, "config.json", INDEX, *shards])
    order = []
    for shard in shards:
        held = safetensors.read_header(tmp_path / "out" / shard)
        order += held
        assert sum(tensor.size for tensor in held.values()) <= limit or len(held) == 1
        assert {name for name, home in index["weight_map"].items() if home == shard} == held.keys()
    assert order[0] == "model.embed.weight" and order[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert [name for name in order if ".0." in name and "expert" not in name] == [name for name in order if name.startswith("model.layers.0.")]
    identical(again(tmp_path / "out", tree), tree)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    tree = params()
    write(tmp_path / "out", tree, shard_bytes=1)
    assert len(set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values())) == len(theirs(tree))
    identical(again(tmp_path / "out", tree), tree)


def test_extra_files_and_digests(tmp_path):
    write(tmp_path / "out", params(), generation_config={"eos_token_id": 3}, extra_files={"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}"})
    out = tmp_path / "out"
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 3}
    assert (out / "chat_template.jinja").read_bytes() == b"{{ x }}"
    digests = {entry.name: hashlib.sha256(entry.read_bytes()).hexdigest() for entry in out.iterdir() if entry.name != SUMS}
    assert (out / SUMS).read_text() == "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=out, capture_output=True, check=False).returncode == 0
    (out / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(UserError, match=r"tokenizer.json is damaged"):
        open_directory(out, "x")


@pytest.mark.parametrize("name", ["config.json", SUMS, "model.safetensors", INDEX, "../x", "sub/x"])
def test_an_extra_file_does_not_replace_one_of_ours(tmp_path, name):
    with pytest.raises(ValueError, match="is not a plain name, or the export writes it itself"):
        write(tmp_path / "out", params(), extra_files={name: b""})
    assert files(tmp_path) == []


# --- leaves ---


def test_arrays_on_devices_and_lazy_ones_are_written_as_their_values(tmp_path):
    tree = params()
    mesh = distributed.make_mesh({name: 1 for name in distributed.AXES} | {"fsdp": 2, "tensor": 2}, 4)
    place = lambda path, leaf: jax.device_put(leaf, NamedSharding(mesh, {  # noqa: E731
        "ends/embedding": PartitionSpec(None, "fsdp"), "layers/0/query/kernel": PartitionSpec("fsdp", "tensor"),
        "layers/1/experts/up": PartitionSpec(None, "tensor", None), "layers/1/output/kernel": PartitionSpec(("fsdp", "tensor"), None),
    }.get(path, PartitionSpec())))
    flat = traverse_util.flatten_dict(tree, sep="/")
    sharded = traverse_util.unflatten_dict({path: place(path, leaf) for path, leaf in flat.items()}, sep="/")
    write(tmp_path / "sharded", sharded)
    identical(again(tmp_path / "sharded", tree), tree)

    lazy = read_params(open_directory(tmp_path / "sharded", "x"), ROWS, CONFIG, abstract(tree))
    write(tmp_path / "lazy", lazy)
    assert (tmp_path / "lazy" / SUMS).read_bytes() == (tmp_path / "sharded" / SUMS).read_bytes()


def test_only_one_expert_is_read_at_a_time(tmp_path):
    tree, seen = params(), []
    up = tree["layers"]["1"]["experts"]["up"]
    lazy = [Lazy(x.shape, x.dtype, (((), lambda e=e, x=x: seen.append(e) or x),)) for e, x in enumerate(up)]
    tree["layers"]["1"]["experts"]["up"] = Lazy.stack(lazy)
    write(tmp_path / "out", tree)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("fsdp")])
def test_a_device_array_is_copied_and_not_pinned(spec):
    """A view would keep the buffer, which the next step may want to donate."""
    mesh = distributed.make_mesh({name: 1 for name in distributed.AXES} | {"fsdp": 2}, 2)
    leaf = jax.device_put(np.arange(64, dtype=np.float32), NamedSharding(mesh, spec))
    given = export.on_host(leaf)
    np.testing.assert_array_equal(given, np.arange(64, dtype=np.float32), strict=True)
    starts = [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
    assert not any(start <= given.ctypes.data < start + 256 for start in starts)


def test_tied_models_and_reward_models_and_value_heads(tmp_path):
    tree = params(without=("ends/lm_head",), ends__score_head__kernel=(6, 1))
    write(tmp_path / "reward", tree)
    read = load_file(tmp_path / "reward" / "model.safetensors")
    assert "lm_head.weight" not in read and read["score.weight"].shape == (1, 6)
    identical(again(tmp_path / "reward", tree), tree)

    tree = params(ends__value_head__kernel=(6, 1), ends__value_head__bias=(1,))
    write(tmp_path / "value", tree, dtype="bfloat16")
    assert "value_head.safetensors" in (tmp_path / "value" / SUMS).read_text()
    head = load_file(tmp_path / "value" / "value_head.safetensors")
    assert head.keys() == {"kernel", "bias"} and not any("value" in name for name in load_file(tmp_path / "value" / "model.safetensors"))
    identical(again(tmp_path / "value", tree)["ends"]["value_head"], tree["ends"]["value_head"])  # float32 in any export


def test_every_leaf_is_written_once_or_refused(tmp_path):
    tree = params(layers__0__query__lora_a=(6, 2), layers__0__query__lora_b=(2, 16))
    with pytest.raises(UserError, match="has no place for layers/0/query/lora_a, layers/0/query/lora_b: merge adapters and dequantise kernels first"):
        write(tmp_path / "out", tree)
    with pytest.raises(ValueError, match="several rows of family 'llama' hold ends/norm/scale"):
        write(tmp_path / "out", params(), rows=(*ROWS, same("model.other.weight", "ends/norm/scale")))
    tree = params()
    del tree["layers"]["1"]
    with pytest.raises(ValueError, match="2 layers are expected under 'layers'"):
        write(tmp_path / "out", tree)
    assert files(tmp_path) == []


def test_values_beyond_float16_and_other_dtypes_are_refused(tmp_path):
    tree = params()
    tree["ends"]["norm"]["scale"][0] = 1e6
    with pytest.raises(UserError, match=r"'model.norm.weight' holds values beyond the range of float16: export it as bfloat16 or float32"):
        write(tmp_path / "out", tree, dtype="float16")
    with pytest.raises(UserError, match="dtype = 'int8': must be one of float32, bfloat16, float16"):
        write(tmp_path / "out", tree, dtype="int8")
    assert files(tmp_path) == []


# --- the target ---


def failing(tree):
    """A tree whose last tensor cannot be read."""

    def read():
        raise OSError(5, "Input/output error")

    tree["ends"]["lm_head"] = Lazy((6, 11), np.dtype(np.float32), (((), read),))
    return tree


def test_an_export_that_fails_leaves_what_was_there(tmp_path):
    with pytest.raises(UserError, match=r"--to-hf = .*/out' could not be written \(.*Input/output error\); check the disk's space"):
        write(tmp_path / "out", failing(params()))
    assert files(tmp_path) == []
    write(tmp_path / "out", params())
    before = (tmp_path / "out" / SUMS).read_bytes()
    with pytest.raises(UserError, match="could not be written"):
        write(tmp_path / "out", failing(params()), shard_bytes=100)
    assert files(tmp_path) == ["out"] and (tmp_path / "out" / SUMS).read_bytes() == before


def test_an_earlier_export_is_replaced_whole(tmp_path):
    write(tmp_path / "out", params(), shard_bytes=100, extra_files={"old.json": b"{}"})
    tree = jax.tree.map(lambda x: 2 * x, params())
    write(tmp_path / "out", tree)
    assert files(tmp_path / "out") == [SUMS, "config.json", "model.safetensors"] and files(tmp_path) == ["out"]
    identical(again(tmp_path / "out", tree), tree)


def test_an_export_may_replace_what_it_reads_from(tmp_path):
    tree = params()
    write(tmp_path / "out", tree, shard_bytes=500)
    write(tmp_path / "out", read_params(open_directory(tmp_path / "out", "x"), ROWS, CONFIG, abstract(tree)))
    identical(again(tmp_path / "out", tree), tree)


def test_an_empty_folder_is_taken_and_a_link_is_followed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write(tmp_path / "link", params())
    assert (tmp_path / "link").is_symlink() and "model.safetensors" in files(tmp_path / "empty")


def test_a_folder_of_anything_else_is_refused(tmp_path):
    out = tmp_path / "out"
    refused = lambda names: pytest.raises(UserError, match=rf"holds files that are not of an export \({names}\): name a new folder, or empty")  # noqa: E731
    write(out, params())
    (out / "notes.md").write_text("mine")
    with refused("notes.md"):
        write(out, params())
    (out / "notes.md").unlink()
    (out / "runs").mkdir()
    with refused("runs"):
        write(out, params())
    (out / "runs").rmdir()

    # A model of someone else, which has a SHA256SUMS of all its files.
    safetensors.write(out / "model.safetensors", [safetensors.Output("x", np.dtype(np.float32), (1,), lambda: np.zeros(1, np.float32))])
    with refused(f"{SUMS}, config.json, model.safetensors"):
        write(out, params())
    (out / "model.safetensors").write_bytes(b"damaged")
    with refused(f"{SUMS}, config.json, model.safetensors"):
        write(out, params())
    for number in range(4):
        (out / f"{number}.txt").write_text("")
    with refused(f"0.txt, 1.txt, 2.txt, 3.txt, {SUMS} …"):
        write(out, params())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: name a folder"):
        write(tmp_path / "file", params())


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 2500))
    with pytest.raises(UserError, match=r"needs 0.00 GB and its disk has 0.00 GB free: make room, or name another"):
        write(tmp_path / "new" / "out", params())
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--to-hf = .*/file/out' could not be written .*check the disk's space and the folder's permissions"):
        write(tmp_path / "file" / "out", params())
