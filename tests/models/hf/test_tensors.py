"""From tensors to parameters: every kind of row, every misfit in one error, and no more in memory than a tensor or two."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models.hf import safetensors
from rlhf_jax.models.hf.directory import Directory, open_directory
from rlhf_jax.models.hf.rows import Row, expand, same, transposed
from rlhf_jax.models.hf.tensors import read_params
from rlhf_jax.models.lazy import Lazy
from tests.models.hf import invented, resident
from tests.models.hf.invented import CONFIG, IGNORED, ROWS, abstract, params, theirs, write_file


def opened(folder, tensors, value_head=None) -> Directory:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(invented.CONFIG_JSON))
    write_file(folder / "model.safetensors", tensors)
    if value_head is not None:
        write_file(folder / "value_head.safetensors", value_head)
    return open_directory(folder, "config.init_from")


def read(folder, tensors, tree, *, config=CONFIG, value_head=None, **options):
    return read_params(opened(folder, tensors, value_head), ROWS, config, abstract(tree), ignored=IGNORED, **options)


def equal(loaded, tree):
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for (path, leaf), wanted in zip(jax.tree_util.tree_leaves_with_path(loaded), jax.tree.leaves(tree)):
        assert isinstance(leaf, Lazy) and leaf.shape == wanted.shape, path
        np.testing.assert_array_equal(np.asarray(leaf), wanted, err_msg=str(path), strict=True)


def problems(folder, tensors, tree, **options) -> list[str]:
    """The phrases of the one error."""
    with pytest.raises(UserError) as error:
        read(folder, tensors, tree, **options)
    head = f"config.init_from = {str(folder)!r}: "
    tail = "; check that config.json belongs to these weights, or save the model again with transformers"
    message = str(error.value)
    assert message.startswith(head) and message.endswith(tail)
    count, _, phrases = message.removeprefix(head).removesuffix(tail).partition(" of its tensors do not fit the llama model of its config.json: ")
    assert int(count) == len(phrases.split("; "))
    return phrases.split("; ")


def test_every_kind_of_row(tmp_path):
    tree = params()
    loaded = read(tmp_path, theirs(tree), tree)
    equal(loaded, tree)
    experts = loaded["layers"]["1"]["experts"]["up"]
    assert [at for at, _ in experts.pieces] == [(0,), (1,), (2,)]
    np.testing.assert_array_equal(np.asarray(experts[1]), tree["layers"]["1"]["experts"]["up"][1])


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    tree, done = params(), []
    original = safetensors.Tensor.read
    monkeypatch.setattr(safetensors.Tensor, "read", lambda self: done.append(self.name) or original(self))
    loaded = read(tmp_path, theirs(tree), tree)
    assert done == []
    np.asarray(loaded["layers"]["0"]["key"]["kernel"])
    assert done == ["model.layers.0.qkv.weight"]


def test_a_slice_of_a_fused_tensor_does_not_keep_the_rest(tmp_path):
    def owner(array):
        return array if not isinstance(array.base, np.ndarray) else owner(array.base)

    tree = params()
    tree["layers"]["0"]["pair"] = {"first": np.arange(3, dtype=np.float32), "second": np.arange(4, dtype=np.float32)}
    pair = ("layers/{i}/pair/first", "layers/{i}/pair/second")  # contiguous slices, unlike those of a transposed matrix
    row = Row("model.layers.{i}.pair.bias", pair, lambda tensor, _: (tensor[:3], tensor[3:]), lambda parts, _: np.concatenate(parts))
    tensors = theirs(tree) | {"model.layers.0.pair.bias": np.concatenate(list(tree["layers"]["0"]["pair"].values()))}
    loaded = read_params(opened(tmp_path, tensors), (*ROWS, row), CONFIG, abstract(tree))
    equal(loaded, tree)
    for leaf in (loaded["layers"]["0"]["key"]["kernel"], loaded["layers"]["0"]["pair"]["first"], loaded["layers"]["0"]["pair"]["second"]):
        (_, piece), = leaf.pieces
        assert owner(piece()).nbytes == piece().nbytes


def test_the_dtype_is_the_files(tmp_path):
    tree = params()
    tensors = {name: x.astype(jnp.bfloat16) for name, x in theirs(tree).items()}
    tensors["model.layers.1.experts.2.up.weight"] = theirs(tree)["model.layers.1.experts.2.up.weight"]
    loaded = read(tmp_path, tensors, tree)
    assert loaded["ends"]["embedding"].dtype == jnp.bfloat16 and loaded["layers"]["1"]["experts"]["up"].dtype == np.float32
    up = np.asarray(loaded["layers"]["1"]["experts"]["up"])
    np.testing.assert_array_equal(up[2], tree["layers"]["1"]["experts"]["up"][2])
    np.testing.assert_array_equal(up[1], tree["layers"]["1"]["experts"]["up"][1].astype(jnp.bfloat16).astype(np.float32))


# --- names ---


@pytest.mark.parametrize("head", [True, False])
def test_the_plain_models_names_lack_the_first_part(tmp_path, head):
    tree = params() if head else params(without=("ends/lm_head",))
    tensors = {name.removeprefix("model."): x for name, x in theirs(tree).items()} | {"layers.0.rotary.inv_freq": np.ones(2, np.float32)}
    assert ("lm_head.weight" in tensors) == head
    equal(read(tmp_path, tensors, tree, config=dataclasses.replace(CONFIG, tied=not head)), tree)


def test_the_first_part_is_not_missing_from_some_alone(tmp_path):
    tree = params()
    tensors = theirs(tree)
    tensors["norm.weight"] = tensors.pop("model.norm.weight")
    assert problems(tmp_path, tensors, tree) == ["model.norm.weight is missing", "norm.weight is not a parameter of the model"]


def test_missing_names_are_given_as_the_file_would_call_them(tmp_path):
    tree = params()
    tensors = {name.removeprefix("model."): x for name, x in theirs(tree).items()}
    del tensors["norm.weight"], tensors["lm_head.weight"]
    assert problems(tmp_path, tensors | {"extra": np.ones(1, np.float32)}, tree) == [
        "norm.weight is missing", "lm_head.weight is missing (and config.json does not tie it to the embedding)",
        "extra is not a parameter of the model",
    ]


def test_other_names_of_the_family(tmp_path):
    tree = params()
    tensors = {re.sub(r"^model\.", "text.model.", name): x for name, x in theirs(tree).items()}
    rule = ((r"^text\.(model\.)?", "model."),)
    equal(read(tmp_path, tensors, tree, renamed=rule), tree)
    tensors["model.norm.weight"] = tensors["text.model.norm.weight"]
    assert problems(tmp_path, tensors, tree, renamed=rule) == ["text.model.norm.weight and model.norm.weight are the same parameter"]
    del tensors["text.model.layers.1.router.weight"], tensors["model.norm.weight"]
    tensors["text.model.layers.0.up.weight"] = np.ones((6, 7), np.float32)
    assert problems(tmp_path, tensors, tree, renamed=rule) == [
        "text.model.layers.0.up.weight has shape [6, 7] and not [7, 6]", "model.layers.1.router.weight is missing",
    ]


# --- misfits ---


def test_all_misfits_are_in_one_error(tmp_path):
    tree = params()
    tensors = theirs(tree)
    del tensors["model.layers.1.experts.1.up.weight"]
    tensors["model.layers.0.qkv.weight"] = np.ones((31, 6), np.float32)
    tensors["model.layers.1.qkv.weight"] = np.ones((6, 32), np.float16)
    tensors["model.embed.weight"] = np.ones((), np.float32)
    tensors["model.layers.2.norm1.weight"] = np.ones(6, np.float32)
    tensors["model.layers.0.out.bias"] = np.ones(6, np.float32)
    tensors["model.layers.1.rotary.inv_freq"] = np.ones(2, np.float32)
    tensors["model.layers.1.rotary.inv_freq.more"] = np.ones(2, np.float32)
    assert sorted(problems(tmp_path, tensors, tree)) == sorted([
        "model.layers.1.experts.1.up.weight is missing",
        "model.layers.0.qkv.weight has shape [31, 6] and not [32, 6]",
        "model.layers.1.qkv.weight has shape [6, 32] and not [32, 6]",
        "model.embed.weight has shape [] and not [11, 6]",
        "model.layers.2.norm1.weight is not a parameter of the model",
        "model.layers.0.out.bias is not a parameter of the model",
        "model.layers.1.rotary.inv_freq.more is not a parameter of the model",
    ])


def test_integers_are_refused_unless_ignored(tmp_path):
    tree = params()
    file = tmp_path / "model.safetensors"
    opened(tmp_path, theirs(tree) | {"model.layers.0.rotary.inv_freq": np.ones(4, np.float32)})
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = "I32"
    header["model.embed.weight"] |= {"dtype": "I8", "shape": [11, 24]}
    header["model.layers.0.rotary.inv_freq"]["dtype"] = "U32"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(UserError, match=r": 2 of its tensors .*model.norm.weight is I32 and none of F64, F32, F16, BF16") as error:
        read_params(open_directory(tmp_path, "x"), ROWS, CONFIG, abstract(tree), ignored=IGNORED)
    assert "model.embed.weight has shape [11, 24] and not [11, 6] and is I8 and none of F64, F32, F16, BF16" in str(error.value)


def test_layers_beyond_the_configs_are_superfluous(tmp_path):
    whole, tree = params(), params()
    del tree["layers"]["1"]
    found = problems(tmp_path, theirs(whole), tree, config=dataclasses.replace(CONFIG, layers=1))
    assert sorted(found) == sorted(f"{name} is not a parameter of the model" for name in theirs(whole) if name.startswith("model.layers.1."))


# --- heads ---


def test_a_tied_output_matrix_equals_the_embedding_to_the_bit(tmp_path):
    tree, tied = params(without=("ends/lm_head",)), dataclasses.replace(CONFIG, tied=True)
    tensors = theirs(tree)
    equal(read(tmp_path, tensors, tree, config=tied), tree)
    equal(read(tmp_path, tensors | {"lm_head.weight": tensors["model.embed.weight"]}, tree, config=tied), tree)
    differs = "lm_head.weight differs from model.embed.weight, to which config.json ties it (tie_word_embeddings)"
    nudged = tensors["model.embed.weight"].copy()
    nudged[-1, -1] = np.nextafter(nudged[-1, -1], np.float32(9))
    for other in (nudged, tensors["model.embed.weight"].astype(np.float64), tensors["model.embed.weight"].reshape(6, 11)):
        assert problems(tmp_path, tensors | {"lm_head.weight": other}, tree, config=tied) == [differs]
    assert problems(tmp_path, tensors | {"lm_head.weight": nudged}, tree) == ["lm_head.weight is not a parameter of the model"]


def test_a_reward_models_head(tmp_path):
    tree = params(without=("ends/lm_head",), ends__score_head__kernel=(6, 1))
    tensors = theirs(tree)
    assert tensors["score.weight"].shape == (1, 6)
    equal(read(tmp_path, tensors, tree), tree)
    equal(read(tmp_path, {name.removeprefix("model."): x for name, x in tensors.items()}, tree), tree)
    tensors["score.weight"] = np.ones((2, 6), np.float32)
    assert problems(tmp_path, tensors, tree) == ["score.weight has shape [2, 6], a row per label, and a reward model has one (num_labels = 1)"]
    tensors["score.weight"] = np.ones((1, 7), np.float32)
    assert problems(tmp_path, tensors, tree) == ["score.weight has shape [1, 7] and not [1, 6]"]


def test_a_value_head_has_a_file_of_its_own(tmp_path):
    tree = params(ends__value_head__kernel=(6, 1), ends__value_head__bias=(1,))
    tensors, head = theirs(tree), tree["ends"]["value_head"]
    assert problems(tmp_path, tensors, tree) == ["bias of value_head.safetensors is missing", "kernel of value_head.safetensors is missing"]
    equal(read(tmp_path, tensors, tree, value_head=head), tree)
    equal(read(tmp_path, tensors, params(), value_head=head), params())  # a policy does not ask for it
    wrong = {"kernel": head["kernel"].T, "bias": head["bias"], "scale": head["bias"]}
    assert problems(tmp_path, tensors, tree, value_head=wrong) == [
        "kernel of value_head.safetensors has shape [1, 6] and not [6, 1]", "scale of value_head.safetensors is not a parameter of the model",
    ]


# --- tables ---


def test_a_table_that_contradicts_itself_is_a_bug(tmp_path):
    tree = params()
    source = opened(tmp_path, theirs(tree))
    with pytest.raises(ValueError, match="has no row for layers/0/up/kernel"):
        read_params(source, [row for row in ROWS if "up.weight" not in row.theirs or "{e}" in row.theirs], CONFIG, abstract(tree))
    with pytest.raises(ValueError, match=r"several rows .* hold ends/norm/scale"):
        read_params(source, (*ROWS, same("model.other", "ends/norm/scale")), CONFIG, abstract(tree))
    with pytest.raises(ValueError, match=r"holds layers/0/query/kernel, .* of which the network has only a part"):
        read_params(source, ROWS, CONFIG, abstract(params(without=("layers/0/key/kernel",))))
    short = Row("model.norm.weight", ("ends/norm/scale",), lambda tensor, _: (tensor[:1],), lambda parts, _: parts[0])
    loaded = read_params(source, [short if row.theirs == short.theirs else row for row in ROWS], CONFIG, abstract(tree))
    with pytest.raises(ValueError, match="splits"):
        np.asarray(loaded["ends"]["norm"]["scale"])


def test_the_table_is_walked_layer_by_layer(tmp_path):
    names = [name for placement in expand(ROWS, CONFIG, invented.SHAPES) for name in placement.theirs]
    assert names == [
        "model.embed.weight",
        "model.layers.0.norm1.weight", "model.layers.0.qkv.weight", "model.layers.0.out.weight", "model.layers.0.up.weight",
        "model.layers.1.norm1.weight", "model.layers.1.qkv.weight", "model.layers.1.out.weight", "model.layers.1.router.weight",
        *(f"model.layers.1.experts.{e}.up.weight" for e in range(3)),
        "model.norm.weight", "lm_head.weight",
    ]
    shapes = {placement.theirs[0]: placement.shape(invented.SHAPES, CONFIG) for placement in expand(ROWS, CONFIG, invented.SHAPES)}
    assert all(theirs(params())[name].shape == shape for name, shape in shapes.items())


def test_a_family_may_name_the_score_head_itself():
    rows = (*ROWS, transposed("classifier.weight", "ends/score_head/kernel"))
    paths = {*invented.SHAPES, "ends/score_head/kernel"}
    assert [p.theirs for p in expand(rows, CONFIG, paths) if p.ours == ("ends/score_head/kernel",)] == [("classifier.weight",)]
    assert [p.theirs for p in expand(ROWS, CONFIG, paths) if p.ours == ("ends/score_head/kernel",)] == [("score.weight",)]


# --- memory ---


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    resident.checkpoint(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("mode", ["layers", "scan", pytest.param("sharded", marks=pytest.mark.slow)])
def test_loading_holds_little_more_than_what_is_resident(large, mode):
    """Peak RSS − baseline − resident ≤ 2.5 × the largest tensor, in a process of its own."""
    # glibc keeps what is freed below 32 MiB for later; tensors of real models are larger, and go back to the system as these do with this threshold.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.models.hf.resident", mode, str(large)], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    measured = json.loads(ran.stdout.splitlines()[-1])
    assert measured["resident"] > 8 * measured["largest"]  # holding it all twice would not go unnoticed
    assert measured["peak"] - measured["baseline"] - measured["resident"] <= 2.5 * measured["largest"], measured
