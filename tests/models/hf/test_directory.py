"""Opening a directory: what a sound one holds, and one sentence with the remedy for each that is not."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models.hf.directory import INDEX, SUMS, is_directory, open_directory
from tests.models.hf.invented import write_file

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.arange(4, dtype=np.float16)}


def save(folder: pathlib.Path, *, sharded: bool = False, **config) -> pathlib.Path:
    """A sound directory: one file, or `x` in the first shard and `y` in the second."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "invented"} | config))
    if sharded:
        write_file(folder / A, {"x": TENSORS["x"]})
        write_file(folder / B, {"y": TENSORS["y"]})
        index(folder, {"x": A, "y": B})
    else:
        write_file(folder / "model.safetensors", TENSORS)
    return folder


def index(folder: pathlib.Path, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))


def refused(folder: pathlib.Path, phrase: str) -> str:
    with pytest.raises(UserError, match=phrase) as error:
        open_directory(folder, "config.init_from")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_sound_directory(tmp_path, sharded):
    save(tmp_path, sharded=sharded, hidden_size=6)
    source = open_directory(tmp_path, "config.init_from")
    assert source.config == {"model_type": "invented", "hidden_size": 6} and source.generation is None and source.value_head is None
    assert str(source) == f"config.init_from = {str(tmp_path)!r}" and is_directory(tmp_path)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(source.tensors[name].read(), array)


def test_generation_config_and_value_head_are_opened(tmp_path):
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    write_file(tmp_path / "value_head.safetensors", {"kernel": np.ones((3, 1), np.float32), "bias": np.ones(1, np.float32)})
    source = open_directory(tmp_path, "--from-hf")
    assert source.generation == {"eos_token_id": 3} and set(source.value_head) == {"kernel", "bias"} and set(source.tensors) == {"x", "y"}


def test_what_looks_like_a_directory(tmp_path):
    assert not is_directory(tmp_path) and not is_directory(tmp_path / "absent")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    assert not is_directory(tmp_path)  # a run of ours
    for name in ("pytorch_model.bin", "model.safetensors", "config.json", INDEX):
        (tmp_path / name).write_text("")
        assert is_directory(tmp_path)
        (tmp_path / name).unlink()


# --- config.json ---


def test_no_folder(tmp_path):
    refused(tmp_path / "absent", "is not a local folder: name a downloaded Hugging Face model")


def test_no_config(tmp_path):
    save(tmp_path)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "holds no config.json: download the whole model, or save it with transformers' `save_pretrained`")


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("{", "is not JSON .*; download or export it again"),
        ("[1]", "holds a list and not a JSON object"),
        ("\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_config_that_is_no_object(tmp_path, text, phrase):
    save(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, f"config.json {phrase}")


def test_a_quantised_model(tmp_path):
    save(tmp_path, quantization_config={"quant_method": "gptq"})
    refused(tmp_path, r"has a quantization_config, and only unquantised weights are read; download the original model, or .*model.dequantize\(\)")


# --- which weights ---


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights(tmp_path, name):
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    refused(tmp_path, rf"holds pickled weights only \({name}\), which are not read because .*save_pretrained\(NEW_FOLDER, safe_serialization=True\)")


def test_pickled_weights_beside_safetensors_do_not_matter(tmp_path):
    save(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert set(open_directory(tmp_path, "--model").tensors) == {"x", "y"}


def test_no_weights(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "holds no model.safetensors and no model.safetensors.index.json: download the whole model")
    (tmp_path / "weights.gguf").write_bytes(b"")
    refused(tmp_path, r"\(only weights.gguf\): download the whole model")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "holds a PEFT adapter and no model: name the base model's folder here")


def test_one_file_and_an_index(tmp_path):
    save(tmp_path)
    save(tmp_path, sharded=True)
    refused(tmp_path, "holds both model.safetensors and model.safetensors.index.json, .*: remove the one that is not meant")


def test_shards_without_an_index(tmp_path):
    save(tmp_path, sharded=True)
    (tmp_path / INDEX).unlink()
    refused(tmp_path, f"holds {A}, {B} and no {INDEX}, which says what is in them: download the index too")


# --- index and shards ---


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["x"]}, {"weight_map": {"x": 3}}])
def test_an_index_without_a_weight_map(tmp_path, content):
    save(tmp_path, sharded=True)
    (tmp_path / INDEX).write_text(json.dumps(content))
    refused(tmp_path, f"{INDEX} has no weight_map from tensors to files; download it again")


def test_missing_shards_are_all_named(tmp_path):
    save(tmp_path, sharded=True)
    (tmp_path / A).unlink()
    (tmp_path / B).unlink()
    refused(tmp_path, f"lacks 2 of the 2 shards that {INDEX} names, {A}, {B}: download them")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_shard_that_no_index_names(tmp_path, sharded):
    save(tmp_path, sharded=sharded)
    write_file(tmp_path / "model-00001-of-00003.safetensors", TENSORS)
    refused(tmp_path, r"holds shards that no index names, model-00001-of-00003.safetensors: remove them")


def test_a_tensor_that_is_not_in_its_shard_or_in_two_or_in_none(tmp_path):
    save(tmp_path, sharded=True)
    index(tmp_path, {"x": A, "y": B, "z": B})
    refused(tmp_path, f"contradicts the shards: z is not in {B}; download the model again")
    write_file(tmp_path / B, {"y": TENSORS["y"], "x": TENSORS["x"], "w": TENSORS["x"]})
    message = refused(tmp_path, f"x is in {B}, where the index names {A}")
    assert f"w is in {B}, where the index does not name it" in message and f"z is not in {B}" in message


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..", "", "a\\b.safetensors", "sub/../x.safetensors"]
)
def test_a_shard_path_that_leaves_the_directory(tmp_path, name):
    save(tmp_path / "other")
    save(tmp_path / "model", sharded=True)
    (tmp_path / "model" / "sub").mkdir()
    (tmp_path / "model" / A).unlink()
    index(tmp_path / "model", {"x": name, "y": B})
    refused(tmp_path / "model", "names the shard .*, and a shard is a plain file name of the directory; download the model again")


def test_a_shard_that_is_not_safetensors(tmp_path):
    save(tmp_path, sharded=True)
    (tmp_path / A).rename(tmp_path / "pytorch_model.bin")
    index(tmp_path, {"x": "pytorch_model.bin", "y": B})
    refused(tmp_path, "names the shard 'pytorch_model.bin', and only .safetensors files are read")


# --- symbolic links ---


@pytest.mark.parametrize("name", ["model.safetensors", "value_head.safetensors"])
def test_a_link_out_of_the_directory(tmp_path, name):
    save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    save(tmp_path / "model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / name).symlink_to("../elsewhere.safetensors")
    refused(tmp_path / "model", f"{name} is a link to '{tmp_path}/elsewhere.safetensors', outside the directory and the hub's cache")


def test_a_link_to_itself(tmp_path):
    save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors").symlink_to("model.safetensors")
    refused(tmp_path / "model", "model.safetensors is a link that cannot be followed")


def test_a_sharded_link_out_of_the_directory(tmp_path):
    save(tmp_path / "model", sharded=True)
    (tmp_path / "model" / A).rename(tmp_path / A)
    (tmp_path / "model" / A).symlink_to(tmp_path / A)
    refused(tmp_path / "model", f"{A} is a link to '{tmp_path}/{A}', outside the directory")


def test_links_of_the_hubs_cache_and_within_the_directory_are_followed(tmp_path):
    cache = tmp_path / "models--someone--something"
    snapshot = save(cache / "snapshots" / "0a1b", sharded=True)
    (cache / "blobs").mkdir()
    for name in (A, B, INDEX, "config.json"):
        (snapshot / name).rename(cache / "blobs" / f"of-{name}")
        (snapshot / name).symlink_to(f"../../blobs/of-{name}")
    np.testing.assert_array_equal(open_directory(snapshot, "--model").tensors["x"].read(), TENSORS["x"])

    local = save(tmp_path / "local")  # `local_dir` with links into a cache
    (local / "model.safetensors").rename(cache / "blobs" / "whole")
    (local / "model.safetensors").symlink_to(cache / "blobs" / "whole")
    assert set(open_directory(local, "--model").tensors) == {"x", "y"}

    (tmp_path / "linked").symlink_to(snapshot)
    assert set(open_directory(tmp_path / "linked", "--model").tensors) == {"x", "y"}

    inner = save(tmp_path / "inner")
    (inner / "model.safetensors").rename(inner / "weights-v2")
    (inner / "model.safetensors").symlink_to("weights-v2")
    assert set(open_directory(inner, "--model").tensors) == {"x", "y"}


def test_a_link_to_nothing(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("gone")
    refused(tmp_path, "cannot be read")


# --- SHA256SUMS ---


def sums(folder: pathlib.Path, form: str = "{digest}  {name}") -> None:
    files = [entry for entry in sorted(folder.iterdir()) if entry.is_file()]
    lines = [form.format(digest=hashlib.sha256(entry.read_bytes()).hexdigest(), name=entry.name) for entry in files]
    (folder / SUMS).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("form", ["{digest}  {name}", "{digest} *{name}", "{digest}  ./{name}"])
def test_digests_that_hold_and_one_flipped_bit(tmp_path, form):
    save(tmp_path, sharded=True)
    (tmp_path / "README.md").write_text("words")
    sums(tmp_path, form)
    open_directory(tmp_path, "--model")
    (tmp_path / "README.md").write_text("other words")  # never read
    open_directory(tmp_path, "--model")
    content = bytearray((tmp_path / B).read_bytes())
    content[-1] ^= 1
    (tmp_path / B).write_bytes(content)
    refused(tmp_path, f"differs from its {SUMS}: {B} is damaged; download or export it again")


def test_every_damaged_or_missing_file_of_a_kind_is_named(tmp_path):
    save(tmp_path, sharded=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    sums(tmp_path)
    shutil.copytree(tmp_path, tmp_path.parent / "again")
    (tmp_path / A).write_bytes(b"")
    (tmp_path / B).write_bytes(b"")
    refused(tmp_path, f"{A} is damaged, {B} is damaged")
    again = tmp_path.parent / "again"
    (again / "tokenizer.json").unlink()
    (again / "config.json").write_text("{}")
    refused(again, f"differs from its {SUMS}: tokenizer.json is missing, config.json is damaged")


def test_digests_of_other_folders_are_passed_over(tmp_path):
    save(tmp_path)
    (tmp_path / SUMS).write_text(f"{'0' * 64}  onnx/model.safetensors\n{'0' * 64}  ../x.json\n\n")
    open_directory(tmp_path, "--model")


def test_a_line_that_is_no_digest(tmp_path):
    save(tmp_path)
    (tmp_path / SUMS).write_text("\nabc  model.safetensors\n")
    refused(tmp_path, f"{SUMS}:2 is not a line of sha256sum, 'abc  model.safetensors': make the file again with `sha256sum \\*`, or remove it")

