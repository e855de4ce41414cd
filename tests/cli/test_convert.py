"""`rlhf-jax convert` through the real command line: there and back without loss, adapters, the check, and every bad input."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoint
from rlhf_jax.data import hf_tokenizer
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models.config import Lora
from rlhf_jax.models.hf.directory import open_directory
from rlhf_jax.saved import load_source
from tests.cli.conftest import Command, Outcome
from tests.cli.saved import GOLDEN, config, draw, write_run
from tests.train.runs import rows, write_rows

LORA = Lora(rank=2, alpha=4.0, targets="query|value|down")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return write_run(tmp_path_factory.mktemp("saved") / "policy", config())


def _converts(command: Command, *flags: str) -> Outcome:
    done = command("convert", *flags)
    assert done.code == 0, done.err
    return done


def _same(one: str | pathlib.Path, other: str | pathlib.Path) -> None:
    """Two saved networks that are equal to the bit, text side included."""
    a, b = load_source(str(one), "one"), load_source(str(other), "other")
    assert a.network == b.network and a.config.difference(b.config) == [] and a.config.outputs == b.config.outputs
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a.params), jax.tree.leaves(b.params), strict=True):
        assert (x.dtype == y.dtype or "value_head" in str(path)) and np.array_equal(np.asarray(x), np.asarray(y)), path
    assert (a.tokenizer is None) == (b.tokenizer is None) and (a.template is None) == (b.template is None)
    if a.tokenizer and b.tokenizer:
        assert (a.tokenizer.to_json(), a.tokenizer.stop_ids) == (b.tokenizer.to_json(), b.tokenizer.stop_ids)
        assert all(getattr(a.tokenizer, name) == getattr(b.tokenizer, name) for name in ("pad", "bos", "end", "eos"))
    if a.template and b.template:
        assert a.template.source == b.template.source


@pytest.mark.parametrize(
    "model", [config(), config("reward", tied=True), config(outputs=("lm", "value"), layers=2, kv_heads=1, param_dtype="bfloat16", scan_layers=True)],
    ids=["policy", "reward", "value head"],
)
def test_a_run_comes_back_as_it_was(model, command, tmp_path):
    run, there, back = write_run(tmp_path / "run", model), tmp_path / "hf", tmp_path / "back"
    out = _converts(command, f"--from={run}", f"--to-hf={there}", "--check")
    kind = "reward model" if "score" in model.outputs else "policy"
    count = sum(leaf.size for leaf in jax.tree.leaves(draw(model)))
    assert out.out.startswith(f"{there}: a llama {kind} of {count:,} parameters in {model.param_dtype}, ") and out.err == ""
    assert "random tokens differ by at most 0\n" in out.out
    _same(run, there)
    _converts(command, f"--from-hf={there}", f"--to={back}")
    _same(run, back)
    runtime = dict(scan_layers=True, logits_chunk=512, compute_dtype="float32")  # of an imported network, where no run chooses
    assert load_source(str(back), "back").config == dataclasses.replace(model, **runtime)


def test_what_transformers_reads(run, command, tmp_path):
    """Ids of the control tokens, all stop tokens, and the text side."""
    there = tmp_path / "hf"
    _converts(command, f"--from={run}", f"--to-hf={there}")
    tokenizer = Tokenizer.byte_level()
    opened = open_directory(there, "it")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    assert {name: opened.config[name] for name in ids} == ids and opened.generation == ids
    assert opened.config["architectures"] == ["LlamaForCausalLM"] and opened.config["max_position_embeddings"] == 96
    assert opened.config["dtype"] == opened.config["torch_dtype"] == "float32"
    assert (there / "chat_template.jinja").read_text() == load_source(str(run), "run").template.source
    stops = tokenizer.replace(stops=[3])
    several = write_run(tmp_path / "several", config(), tokenizer=stops)
    _converts(command, f"--from={several}", f"--to-hf={tmp_path / 'stops'}")
    assert open_directory(tmp_path / "stops", "it").generation["eos_token_id"] == list(stops.stop_ids)
    _same(several, tmp_path / "stops")


def test_a_reward_model_whose_padding_ends_texts_names_no_padding(command, tmp_path):
    """transformers would skip the end token, and read the score before it."""
    run = write_run(tmp_path / "run", config("reward"), tokenizer=Tokenizer.byte_level().replace(pad="<|end|>"))
    done = _converts(command, f"--from={run}", f"--to-hf={tmp_path / 'hf'}")
    assert "padding is <|end|>, which ends texts" in done.err
    assert open_directory(tmp_path / "hf", "it").config["pad_token_id"] is None
    stops = Tokenizer.byte_level().replace(stops=[Tokenizer.byte_level().pad_id])  # as Qwen's, which ends no turn with it
    other = write_run(tmp_path / "other", config("reward"), tokenizer=stops)
    assert _converts(command, f"--from={other}", f"--to-hf={tmp_path / 'named'}").err == ""
    assert open_directory(tmp_path / "named", "it").config["pad_token_id"] == stops.pad_id


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_directory_of_transformers_there_and_back(family, command, tmp_path):
    """Without a tokenizer; the logits are still those that transformers gave."""
    ckpt, back = tmp_path / "ckpt", tmp_path / "back"
    done = _converts(command, f"--from-hf={GOLDEN / family}", f"--to={ckpt}")
    assert "the source has no tokenizer" in done.err
    _same(GOLDEN / family, ckpt)
    _converts(command, f"--from={ckpt}", f"--to-hf={back}")
    _same(GOLDEN / family, back)
    before, after = (open_directory(path, "it") for path in (GOLDEN / family, back))
    assert before.config["max_position_embeddings" if family == "llama" else "n_positions"] == after.config[
        "max_position_embeddings" if family == "llama" else "n_positions"]
    expected = np.load(GOLDEN / family / "expected.npz")
    ids = expected["tokens"][0]
    logits = expected["logits"][: len(ids)].astype(np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    path = write_rows(tmp_path / "rows.jsonl", [{"token_ids": ids.tolist()}])
    assert command("score", f"--model={back}", f"--input={path}", f"--output={tmp_path / 'out.jsonl'}").code == 0
    np.testing.assert_allclose(rows(tmp_path / "out.jsonl")[0]["logps"][1:], logps[np.arange(len(ids) - 1), ids[1:]], atol=2e-4)


def test_another_precision(run, command, tmp_path):
    half, coarse = tmp_path / "half", tmp_path / "coarse"
    done = _converts(command, f"--from={run}", f"--to-hf={half}", "--dtype=float16")
    assert "in float16, " in done.out and "parameters of float32 are rounded to float16" in done.err
    again = _converts(command, f"--from-hf={half}", f"--to={tmp_path / 'again'}")
    assert "in float32, " in again.out and again.err == "", "float16 is held exactly"
    _converts(command, f"--from-hf={half}", f"--to-hf={coarse}", "--dtype=bfloat16", "--check")
    exact, rough = load_source(str(run), "run"), load_source(str(coarse), "coarse")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(rough.params)} == {"bfloat16"}
    for x, y in zip(jax.tree.leaves(exact.params), jax.tree.leaves(rough.params), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=2**-7, atol=1e-6)


def test_the_step_that_is_asked_for(run, command, tmp_path):
    other = write_run(tmp_path / "run", config(), seed=1)
    with checkpoint.Checkpointer(other / checkpoint.BEST, every=0, keep=1) as saver:
        meta = dict(load_source(str(other), "other").meta)
        saver.save(2, {checkpoint.PARAMS: {"policy": draw(config(), 2)}}, meta, force=True)
    for which, seed in (("latest", 1), ("best", 2), ("3", 1)):
        _converts(command, f"--from={other}", f"--which={which}", f"--to-hf={tmp_path / which}")
        _same(tmp_path / which, write_run(tmp_path / f"as {which}", config(), seed=seed))
    refused = command("convert", f"--from={other}", "--which=7", f"--to={tmp_path / 'seven'}")
    _complains(refused, "holds no such checkpoint")


def _adapted(folder: pathlib.Path, base: pathlib.Path, settings: Lora = LORA) -> pathlib.Path:
    """A run that holds adapters alone, for a base."""
    model = dataclasses.replace(load_source(str(base), "base").config, lora=settings)
    params = draw(model)
    only = {name: {key: {leaf: value for leaf, value in node.items() if leaf.startswith("lora")} for key, node in layer.items() if "lora_a" in node}
            for name, layer in params["layers"].items()}
    return write_run(folder, model, params={"ends": {}, "layers": only}, base=str(base), reads_text=model.vocab_size == 264)


def test_adapters_are_merged_or_written_alone(command, tmp_path):
    base = GOLDEN / "llama"
    run = _adapted(tmp_path / "run", base)
    path = write_rows(tmp_path / "rows.jsonl", [{"token_ids": list(range(20))}])

    def logps(model: pathlib.Path) -> list[float]:
        done = command("score", f"--model={model}", f"--input={path}", f"--output={tmp_path / 'out.jsonl'}")
        assert done.code == 0, done.err
        return rows(tmp_path / "out.jsonl")[0]["logps"]

    unmerged = logps(run)
    assert logps(_adapted(tmp_path / "went on", run)) == unmerged, "the same adapters, trained on: once, not twice"
    others = logps(_adapted(tmp_path / "others", run, dataclasses.replace(LORA, rank=3)))
    assert np.abs(np.subtract(others, unmerged)).max() > 0.1, "other adapters lie on the first ones"
    assert np.abs(np.subtract(unmerged, logps(base))).max() > 0.1, "the adapters do something"
    for flags in ([f"--to-hf={tmp_path / 'hf'}"], [f"--to={tmp_path / 'ckpt'}"], [f"--to-hf={tmp_path / 'peft'}", "--adapter"]):
        done = _converts(command, f"--from={run}", *flags)
        np.testing.assert_allclose(logps(pathlib.Path(flags[0].partition("=")[2])), unmerged, atol=5e-5)
    assert "adapters of rank 2 for a llama policy, " in done.out
    described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base) and described["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    _converts(command, f"--from-hf={tmp_path / 'peft'}", f"--to={tmp_path / 'merged'}", "--check")
    np.testing.assert_allclose(logps(tmp_path / "merged"), unmerged, atol=5e-5)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**described, "base_model_name_or_path": "meta/none"}))
    (tmp_path / "peft" / "SHA256SUMS").unlink()
    refused = command("convert", f"--from-hf={tmp_path / 'peft'}", f"--to={tmp_path / 'new'}")
    _complains(refused, "base_model_name_or_path = 'meta/none'", "no such folder")


def test_adapters_on_a_run_of_ours(run, command, tmp_path):
    done = _converts(command, f"--from={_adapted(tmp_path / 'run', run)}", f"--to-hf={tmp_path / 'peft'}", "--adapter")
    assert "is no Hugging Face directory: convert it too" in done.err
    assert (tmp_path / "peft" / hf_tokenizer.TEMPLATE).exists()
    _complains(command("convert", f"--from={run}", f"--to-hf={tmp_path / 'none'}", "--adapter"), "has no adapters of its own")


def _complains(done: Outcome, *said: str) -> None:
    assert done.code == 2 and done.out == "", done
    assert done.err.startswith("rlhf-jax: ") and done.err.count("\n") == 1, done.err
    for part in said:
        assert part in done.err, done.err


BAD_LINES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "nothing": ([], ("--from-hf and --from: give exactly one of them, to say what is converted",)),
    "no target": (["--from={run}"], ("--to-hf and --to: give exactly one of them, to say where it goes",)),
    "two sources": (["--from={run}", "--from-hf={llama}", "--to={new}"], ("--from-hf and --from",)),
    "two targets": (["--from={run}", "--to={new}", "--to-hf={new}"], ("--to-hf and --to",)),
    "no such run": (["--from=nowhere", "--to-hf={new}"], ("--from = 'nowhere'", "does not exist")),
    "no such directory": (["--from-hf=nowhere", "--to={new}"], ("--from-hf = 'nowhere' is not a local folder",)),
    "a run for a directory": (["--from-hf={run}", "--to={new}"], ("--from-hf = ", "is a run of rlhf-jax train: name it with --from")),
    "an empty folder": (["--from-hf={empty}", "--to={new}"], ("--from-hf = ", "holds no config.json")),
    "a folder of something else": (["--from={full}", "--to-hf={new}"], ("--from = ", "holds no such checkpoint")),
    "target in use": (["--from={run}", "--to={full}"], ("--to = ", "exists and is not empty: name a new folder")),
    "target in use, theirs": (["--from={run}", "--to-hf={full}"], ("--to-hf = ", "holds files that are not of an export")),
    "target is a file": (["--from={run}", "--to={full}/notes.txt"], ("--to = ", "is not empty")),
    "target is the source": (["--from={run}", "--to-hf={run}"], ("--to-hf = ", "is the source")),
    "remote target": (["--from={run}", "--to=gs://bucket/x"], ("--to = 'gs://bucket/x'", "local folder")),
    "dtype": (["--from={run}", "--to={new}", "--dtype=int8"], ("dtype", "int8")),
    "float16 here": (["--from={run}", "--to={new}", "--dtype=float16"], ("--dtype = 'float16'", "float32 or bfloat16")),
    "which": (["--from={run}", "--to={new}", "--which=last"], ("--which = 'last'", "latest, best or a step's number")),
    "which of a directory": (["--from-hf={llama}", "--to={new}", "--which=best"], ("--which = 'best'", "has no steps")),
    "adapters as a run": (["--from={run}", "--to={new}", "--adapter"], ("--adapter", "--to-hf")),
    "another class": (["--from={odd}", "--to-hf={new}"], ("config.model.qk_norm", "LlamaForCausalLM cannot express")),
    "typo": (["--form={run}"], ("form", "from")),
    "operand": (["{run}"], ("is no flag",)),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_command_line_is_one_sentence(case, run, command, tmp_path):
    flags, said = BAD_LINES[case]
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    paths = {"run": run, "llama": GOLDEN / "llama", "new": tmp_path / "new", "empty": tmp_path / "empty", "full": tmp_path / "full"}
    if "odd" in str(flags):
        paths["odd"] = write_run(tmp_path / "odd", config(qk_norm="head"))
    _complains(command("convert", *(flag.format(**paths) for flag in flags)), *said)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*")), "nothing is left behind"
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_what_fails_half_way_leaves_nothing(run, command, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_jax.data.tokenizer.Tokenizer.save", interrupted)
    assert command("convert", f"--from={run}", f"--to={tmp_path / 'deep' / 'new'}").code == 130
    assert list((tmp_path / "deep").iterdir()) == []


def test_help(command):
    done = command("convert", "--help")
    assert done.code == 0 and all(flag in done.out for flag in ("--from-hf", "--to-hf", "--check", "--adapter"))
    assert max(map(len, done.out.splitlines())) <= 160
