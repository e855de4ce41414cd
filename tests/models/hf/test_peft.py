"""Adapters of PEFT's, in and out: its logits, its tensors, and what is refused. Live where torch, transformers and peft are, from fixtures always."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, families, lora, quantise, transformer
from rlhf_jax.models.config import Lora
from rlhf_jax.models.hf import adapted, safetensors
from rlhf_jax.models.hf.network import open_network
from rlhf_jax.models.hf.peft import CONFIG, PREFIX, WEIGHTS, Adapter, open_adapter, read_adapter
from rlhf_jax.models.hf.peft_export import write_adapter
from rlhf_jax.models.lazy import Lazy
from rlhf_jax.models.networks import merge
from rlhf_jax.types import Array, PyTree
from tests.models.tiny import jit

GOLDEN = Path(__file__).parent / "golden_adapters"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.name != "bases")
TOKENS = np.random.default_rng(0).integers(1, 31, (2, 12)).astype(np.int32)
KEY = "config.init_from"


@functools.cache
def base(name: str) -> tuple[ModelConfig, PyTree]:
    """A fixture's model: unrolled, canonical."""
    opened = open_network(str(GOLDEN / "bases" / name), KEY)
    return dataclasses.replace(opened.config, scan_layers=False, logits_chunk=0), jax.tree.map(np.asarray, opened.params)


def home(name: str) -> str:
    return str(json.loads((GOLDEN / name / CONFIG).read_text())["base_model_name_or_path"])


def read(folder: Path, on: str) -> tuple[ModelConfig, PyTree]:
    """An adapter on a fixture's model: the whole network."""
    config, params = base(on)
    settings, leaves = read_adapter(open_adapter(folder, KEY), config)
    return dataclasses.replace(config, lora=settings), jax.tree.map(np.asarray, merge(leaves, params))


def forward(config: ModelConfig, params: PyTree) -> Array:
    """Logits [2, T, V] of TOKENS, or a reward model's scores [2]."""
    ones = jnp.ones(TOKENS.shape, jnp.int32)
    hidden = transformer.trunk(config, params, jnp.asarray(TOKENS), jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape), ones)
    if "score" in config.outputs:
        return transformer.scalar(config, params, hidden, "score")[:, -1]
    return transformer.unembed(config, params, hidden)


run = jit(forward, static_argnums=0)


def plain(config: ModelConfig, params: PyTree) -> np.ndarray:
    return np.asarray(run(dataclasses.replace(config, lora=None), jax.tree.map(np.asarray, lora.merged(params, config.lora))))


def same_kernels(one: tuple[ModelConfig, PyTree], other: tuple[ModelConfig, PyTree]) -> None:
    """Both networks' kernels are equal with their updates added."""
    made = [{path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(lora.merged(params, config.lora), sep="/").items()}
            for config, params in (one, other)]
    assert made[0].keys() == made[1].keys()
    for path, kernel in made[0].items():
        np.testing.assert_allclose(kernel, made[1][path], atol=1e-6, rtol=1e-6, err_msg=path)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in safetensors.read_header(folder / WEIGHTS).items()}


def drawn(config: ModelConfig, settings: Lora, seed: int = 0) -> PyTree:
    """Adapters of our own, every projection's apart: A, B and magnitudes drawn."""
    rng = np.random.default_rng(seed)
    leaves: dict[str, np.ndarray] = {}
    for path, (into, out) in lora.kernels(config).items():
        if path.rpartition("/")[2] in settings.projections:
            leaves[f"{path}/{lora.A}"] = rng.normal(size=(into, settings.rank)).astype(np.float32) * 0.4
            leaves[f"{path}/{lora.B}"] = rng.normal(size=(settings.rank, out)).astype(np.float32) * 0.4
            if settings.dora:
                leaves[f"{path}/{lora.MAGNITUDE}"] = (1.0 + rng.random(out)).astype(np.float32)
    return traverse_util.unflatten_dict(leaves, sep="/")


# --- what PEFT computed ---


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_peft(name: str) -> None:
    config, params = read(GOLDEN / name, home(name))
    with np.load(GOLDEN / name / "expected.npz") as expected:
        assert np.abs(expected["outputs"] - expected["base"]).max() > 0.1  # the adapter does something
        np.testing.assert_allclose(run(config, params), expected["outputs"], atol=2e-4, rtol=0)
        np.testing.assert_allclose(plain(config, params), expected["outputs"], atol=2e-4, rtol=0)


def test_settings_are_read() -> None:
    settings = {name: read(GOLDEN / name, home(name))[0].lora for name in NAMES}
    everything = "query|key|value|output|gate|up|down"
    assert settings["llama_patterns"] == Lora(rank=4, alpha=5.0, targets=everything)  # of the module with the largest rank
    assert settings["llama_some_layers"] == Lora(rank=2, alpha=4.0, targets="query|value|down", dropout=0.25, rslora=True)
    assert settings["phi3_dora"] == Lora(rank=3, alpha=4.0, targets="query|key|value|gate|up", rslora=True, dora=True)
    assert settings["gpt2_dora"] == Lora(rank=2, alpha=3.0, targets="query|key|value|down", dora=True)
    assert settings["gpt_neox_lora"] == Lora(rank=2, alpha=5.0, targets="query|key|value|output|up|down")
    adapters = {name: open_adapter(GOLDEN / name, KEY) for name in NAMES}
    assert {name for name, adapter in adapters.items() if adapter.network == "reward"} == {"llama_score"}
    assert adapters["phi3_lora"].base == "phi3"


def test_leaves_are_read_when_asked_for(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "phi3_dora", tmp_path / "a")
    adapter = open_adapter(tmp_path / "a", KEY)
    _, leaves = read_adapter(adapter, base("phi3")[0])
    (tmp_path / "a" / WEIGHTS).write_bytes(b"")
    assert all(isinstance(leaf, Lazy) for leaf in jax.tree.leaves(leaves))
    with pytest.raises(UserError, match="cut short"):
        np.asarray(jax.tree.leaves(leaves)[0])


def test_a_layer_without_an_adapter_has_one_of_zeros() -> None:
    _, params = read(GOLDEN / "llama_some_layers", "llama")
    for i, used in enumerate((True, False, True)):
        assert params["layers"][str(i)]["query"][lora.A].any() == params["layers"][str(i)]["query"][lora.B].any() == used


def test_zeros_stay_zeros_in_training() -> None:
    """What fills up a smaller rank, and an adapter of zeros, have no gradient."""
    config, params = read(GOLDEN / "llama_patterns", "llama")
    params["layers"]["1"]["up"] |= {part: np.zeros_like(params["layers"]["1"]["up"][part]) for part in (lora.A, lora.B)}
    grads = jit(jax.grad(lambda p: jnp.square(forward(config, p)).sum()))(params)["layers"]
    for layer in grads.values():
        assert layer["query"][lora.A][:, :2].any() and not layer["query"][lora.A][:, 2:].any()
        assert layer["query"][lora.B][:2].any() and not layer["query"][lora.B][2:].any()
    assert not grads["1"]["up"][lora.A].any() and not grads["1"]["up"][lora.B].any() and grads["0"]["up"][lora.A].any()


# --- written again ---


@pytest.mark.parametrize("name", NAMES)
def test_read_and_written_is_the_same(name: str, tmp_path: Path) -> None:
    """Bit for bit where nothing was filled up or scaled, and in what it adds to kernels everywhere."""
    on = home(name)
    config, params = read(GOLDEN / name, on)
    write_adapter(tmp_path / "out", config, params, on, "reward" if "score" in config.outputs else "policy")
    again, reread = read(tmp_path / "out", on)
    replaced = {PREFIX + row for row in ("model.embed_tokens.weight", "lm_head.weight")} if name == "llama_tables" else set()
    if name not in ("llama_patterns", "llama_some_layers"):
        assert again.lora == config.lora
        before, after = tensors(GOLDEN / name), tensors(tmp_path / "out")
        assert before.keys() - replaced == after.keys()
        for tensor, value in after.items():
            np.testing.assert_array_equal(value, before[tensor], err_msg=tensor, strict=True)
    if not replaced:
        same_kernels((again, reread), (config, params))


KINDS = [
    Lora(rank=2, alpha=3.0, targets="query|key|value|output|gate|up|down", dropout=0.125),
    Lora(rank=2, alpha=3.0, targets="query|value|up", rslora=True),
    Lora(rank=3, alpha=5.0, targets="query|key|value|gate|up|down", dora=True),
    Lora(rank=2, alpha=5.0, targets="value|up", dora=True, rslora=True),
]


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("on", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_own_adapters_on_fused_modules(on: str, kind: int, tmp_path: Path) -> None:
    """Each projection has an A of its own; exported, a fused module's A's are stacked. Read again, the updates are the same."""
    config, params = base(on)
    config = dataclasses.replace(config, lora=KINDS[kind])
    params = merge(drawn(config, KINDS[kind]), params)
    write_adapter(tmp_path / "out", config, params, on, "policy")
    again, reread = read(tmp_path / "out", on)
    assert again.lora is not None and again.lora.rank == KINDS[kind].rank * (1 if on == "llama" else max(
        sum(path in KINDS[kind].projections for path in fused) for fused in
        (("query", "key", "value"), *((("gate", "up"),) if on == "phi3" else ()))))
    assert math.isclose(lora.scale(again.lora), lora.scale(KINDS[kind]), rel_tol=1e-12)
    same_kernels((again, reread), (config, params))


def test_targets_are_named_as_peft_reads_them(tmp_path: Path) -> None:
    """The last word of a module's name, unless another module without an adapter has it too."""
    config = base("gpt2")[0]
    for targets, named in (("output", ["attn.c_proj"]), ("output|down|value", ["c_attn", "c_proj"])):
        settings = Lora(rank=2, alpha=3.0, targets=targets)
        adapters = drawn(config, settings)
        write_adapter(tmp_path / "out", dataclasses.replace(config, lora=settings), adapters, "gpt2", "policy")
        keys = json.loads((tmp_path / "out" / CONFIG).read_text())
        assert keys["target_modules"] == named and keys["fan_in_fan_out"] and keys["rank_pattern"] == {}


def test_the_update_of_every_family(tmp_path: Path) -> None:
    """B A in their layout is what the family's own table makes of our A B, for every family and projection."""
    for family in families.names():
        config = ModelConfig(
            **{**families.fresh(family), "family": family}, vocab_size=11, hidden=8, layers=2, heads=4,
            kv_heads=4 if family in ("gpt2", "gpt_neox") else 2, head_dim=2, mlp=6, context=8, rope_theta=100.0, norm_eps=1e-6, tied=True,
            dropout=0.0, param_dtype="float32", compute_dtype="float32", scan_layers=False, remat="none", logits_chunk=0,
        )
        settings = Lora(rank=3, alpha=3.0, targets=".")
        adapters = drawn(config, settings)
        write_adapter(tmp_path / family, dataclasses.replace(config, lora=settings), adapters, family, "policy")
        written, modules = tensors(tmp_path / family), adapted.modules(config)
        assert {name.rpartition(".lora_")[0] for name in written} == {PREFIX + name for name in modules}
        for name, module in modules.items():
            update = written[f"{PREFIX}{name}.lora_B.weight"] @ written[f"{PREFIX}{name}.lora_A.weight"]  # scales are 1
            ours = [traverse_util.flatten_dict(adapters, sep="/")[f"{path}/{part}"] for path in module.ours for part in (lora.A, lora.B)]
            kernels = [a @ b for a, b in zip(ours[::2], ours[1::2])]
            theirs = module.row.join(kernels, config)
            np.testing.assert_allclose(update, theirs if module.turned else theirs.T, atol=1e-6)


def test_a_quantised_base_and_a_value_head(tmp_path: Path) -> None:
    """Magnitudes of a fused module's other projections come from the codes; a value head goes with the adapter."""
    config, params = base("gpt_neox")
    settings = Lora(rank=2, alpha=3.0, targets="value", dora=True)
    head = {"value_head": {"kernel": np.ones((16, 1), np.float32), "bias": np.full(1, 2.0, np.float32)}}
    whole = merge(drawn(config, settings), {**params, "ends": {**params["ends"], **head}})
    config = dataclasses.replace(config, lora=settings, outputs=("lm", "value"))
    codes = {i: {**layer, "query": {**quantise.write(layer["query"]["kernel"], "int8"), "bias": layer["query"]["bias"]}} for i, layer in
             whole["layers"].items()}
    write_adapter(tmp_path / "out", config, {**whole, "layers": codes}, "gpt_neox", "policy")
    leaves = read_adapter(open_adapter(tmp_path / "out", KEY), dataclasses.replace(config, lora=None))[1]
    np.testing.assert_allclose(leaves["layers"]["0"]["query"][lora.MAGNITUDE], lora.column_norms(whole["layers"]["0"]["query"]["kernel"]), rtol=0.01)
    np.testing.assert_array_equal(leaves["ends"]["value_head"]["bias"], [2.0])
    with pytest.raises(UserError, match="neither adapter nor kernel"):
        write_adapter(tmp_path / "out", config, drawn(config, settings), "gpt_neox", "policy")
    (tmp_path / "out" / "value_head.safetensors").unlink()
    (tmp_path / "out" / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"kernel of value_head\.safetensors is missing"):
        read_adapter(open_adapter(tmp_path / "out", KEY), config)


# --- refused ---


def changed(folder: Path, name: str, **keys: Any) -> Adapter:
    """A fixture's adapter with other keys, opened."""
    shutil.copytree(GOLDEN / name, folder)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | keys))
    return open_adapter(folder, KEY)


REFUSED: dict[str, tuple[Any, str]] = {
    "peft_type": ("LOHA", "only LORA"),
    "task_type": ("SEQ_2_SEQ_LM", "only CAUSAL_LM and SEQ_CLS"),
    "bias": ("all", "trained biases"),
    "init_lora_weights": ("pissa", "moves weights of the base model"),
    "lora_bias": (True, "not built here"),
    "target_parameters": (["mlp.experts.gate_up_proj"], "not built here"),
    "trainable_token_indices": ([1, 2], "not built here"),
    "layer_replication": ([[0, 2]], "not built here"),
    "alora_invocation_tokens": ([5], "not built here"),
    "use_qalora": (True, "not built here"),
    "some_later_option": ({"x": 1}, "not built here"),
    "lora_alpha": (0, "above 0"),
    "r": ("8", "above 0"),
    "alpha_pattern": ({"q_proj": "4"}, "numbers above 0"),
    "lora_dropout": (1.0, "[0, 1)"),
    "base_model_name_or_path": ([None], "must name a model"),
    "target_modules": ("(", "not a regular expression"),
    "exclude_modules": (5, "a text or a list of texts"),
    "layers_to_transform": (["1"], "a number or a list of numbers"),
    "use_dora": ("yes", "true or false"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_built_is_refused(key: str, tmp_path: Path) -> None:
    value, problem = REFUSED[key]
    with pytest.raises(UserError, match=re.escape(f"{CONFIG} has {key} = {value!r}: ") + ".*" + re.escape(problem)):
        changed(tmp_path / "a", "phi3_lora", **{key: value})


def test_keys_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    changed(tmp_path / "a", "phi3_lora", runtime_config={"ephemeral_gpu_offload": True}, some_later_option=None, megatron_core="x", loftq_config={})


def test_every_misfit_is_in_one_error(tmp_path: Path) -> None:
    config = base("llama")[0]
    adapter = changed(tmp_path / "a", "llama_dora", r=5, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    extra = {f"{PREFIX}model.layers.0.mlp.experts.gate.lora_A.weight": np.zeros((2, 2), np.float32), "odd": np.zeros(1, np.float32),
             f"{PREFIX}model.norm.weight": np.zeros(12, np.float32), f"{PREFIX}score.weight": np.zeros((1, 12), np.float32),
             f"{PREFIX}lm_head.weight": np.zeros((30, 12), np.float32)}
    kept = {name: value for name, value in tensors(GOLDEN / "llama_dora").items() if "1.self_attn.q_proj.lora_B" not in name} | extra
    outputs = [safetensors.Output(name, value.dtype, value.shape, functools.partial(lambda x: x, value)) for name, value in kept.items()]
    safetensors.write(adapter.path / WEIGHTS, outputs)
    with pytest.raises(UserError) as error:
        read_adapter(open_adapter(adapter.path, KEY), config)
    for problem in (
        "model.layers.0.self_attn.q_proj.lora_A.weight has shape [2, 12] and not [5, 12]", "model.layers.1.self_attn.q_proj.lora_B.weight is missing",
        "model.layers.2.self_attn.v_proj is among its target_modules and has no tensors", "experts.gate.lora_A.weight: adapters lie beside",
        "odd does not begin with", "model.norm.weight is neither an adapter nor", "score.weight is a reward model's head",
        "lm_head.weight has shape [30, 12] and not [31, 12]",
    ):
        assert problem in str(error.value), problem


def test_contradictions_are_refused(tmp_path: Path) -> None:
    config = base("llama")[0]
    cases = [
        (changed(tmp_path / "1", "llama_dora", use_dora=False), config, "belongs to DoRA, and use_dora is not set"),
        (changed(tmp_path / "2", "llama_some_layers", layers_to_transform=[0]), config, "has an adapter and is not among its target_modules"),
        (changed(tmp_path / "3", "llama_some_layers", use_dora=True), config, "DoRA on some layers only"),
        (changed(tmp_path / "4", "llama_tables"), dataclasses.replace(config, tied=True), "replaces one of two tensors that the model ties"),
        (changed(tmp_path / "5", "llama_dora"), dataclasses.replace(config, layers=2), "adapters lie beside"),
        (changed(tmp_path / "6", "llama_dora"), dataclasses.replace(config, family="gpt2", gated=False), "adapters lie beside"),
    ]
    for adapter, network, problem in cases:
        with pytest.raises(UserError, match=re.escape(problem)):
            read_adapter(adapter, network)


def test_files_that_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        open_adapter(tmp_path, KEY)
    shutil.copytree(GOLDEN / "phi3_lora", tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights \(adapter_model.bin\)"):
        open_adapter(tmp_path / "a", KEY)
    (tmp_path / "a" / "adapter_model.bin").unlink()
    (tmp_path / "a" / WEIGHTS).symlink_to(GOLDEN / "phi3_lora" / WEIGHTS)
    with pytest.raises(UserError, match="outside the directory"):
        open_adapter(tmp_path / "a", KEY)


def test_exports_are_verified_and_not_overwritten(tmp_path: Path) -> None:
    config, params = read(GOLDEN / "phi3_lora", "phi3")
    write_adapter(tmp_path / "out", config, params, "phi3", "policy", extra_files={"tokenizer.json": b"{}"})
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    write_adapter(tmp_path / "out", config, params, "phi3", "policy")
    with (tmp_path / "out" / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged"):
        open_adapter(tmp_path / "out", KEY)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="files that are not of an export"):
        write_adapter(tmp_path / "out", config, params, "phi3", "policy")
    with pytest.raises(UserError, match="no adapters"):
        write_adapter(tmp_path / "new", dataclasses.replace(config, lora=None), params, "phi3", "policy")


# --- live ---


@pytest.fixture(scope="module")
def reference() -> Any:
    """The script that made the fixtures, where torch, transformers and peft are."""
    pytest.importorskip("peft")
    from tests.models.hf import reference_adapters

    return reference_adapters


@pytest.mark.parametrize("name", NAMES)
def test_fixtures_are_what_peft_gives_now(name: str, reference: Any) -> None:
    with np.load(GOLDEN / name / "expected.npz") as expected:
        made = reference.adapted(reference.base(home(name)), **reference.ADAPTERS[name][1])
        np.testing.assert_allclose(reference.outputs(made), expected["outputs"], atol=1e-5)


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("on", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_peft_loads_what_is_exported(on: str, kind: int, reference: Any, tmp_path: Path) -> None:
    """Nothing missing, nothing left over, the same logits, also merged by PEFT."""
    from peft import PeftModel

    config, params = base(on)
    config = dataclasses.replace(config, lora=KINDS[kind])
    params = merge(drawn(config, KINDS[kind], seed=kind), params)
    write_adapter(tmp_path / "out", config, params, on, "policy")
    model = PeftModel.from_pretrained(reference.base(on), str(tmp_path / "out")).eval()
    loaded = {name.replace(".default", "") for name in model.state_dict() if "lora_" in name}
    assert {name.removesuffix(".weight") for name in loaded} == {name.removesuffix(".weight") for name in tensors(tmp_path / "out")}
    ours = run(config, params)
    np.testing.assert_allclose(reference.outputs(model), ours, atol=2e-4, rtol=0)
    np.testing.assert_allclose(reference.outputs(model.merge_and_unload()), ours, atol=2e-4, rtol=0)


def test_peft_loads_an_exported_reward_model(reference: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    config, params = read(GOLDEN / "llama_score", "llama_score")
    params = {**params, "ends": {**params["ends"], "score_head": {"kernel": np.linspace(-1, 1, 12, dtype=np.float32)[:, None]}}}
    write_adapter(tmp_path / "out", config, params, "llama_score", "reward")
    model = PeftModel.from_pretrained(reference.base("llama_score"), str(tmp_path / "out")).eval()
    np.testing.assert_allclose(reference.outputs(model), run(config, params), atol=2e-4, rtol=0)
