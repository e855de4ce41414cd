"""`rlhf-jax score` through the real command line: every form of row, policies and reward models, ours and Hugging Face's, and every bad input."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax import data
from rlhf_jax.data import mixed
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.eval.models import Policy, RewardModel
from rlhf_jax.models import Networks, NetworkSpec
from rlhf_jax.saved import load_source
from rlhf_jax.train.assemble import assemble
from rlhf_jax.train.config import check
from rlhf_jax.train.loop import train
from rlhf_jax.train.step import fill_reference
from tests.cli.conftest import Command
from tests.cli.saved import GOLDEN, config, write_run
from tests.train.runs import arguments, metrics, rows, tiny, write_rows

DEMOS = [
    {"prompt": "Sort 5 3", "completion": "3 5", "id": "b"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "so"},
                  {"role": "assistant", "content": "no"}]},
    {"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "completion": [{"role": "assistant", "content": "z"}]},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("saved")
    for network in ("policy", "reward"):
        write_run(folder / network, config(network))
    return folder


def _score(command: Command, model: pathlib.Path, tmp_path: pathlib.Path, content: list, *flags: str) -> list[dict]:
    done = command("score", f"--model={model}", f"--input={write_rows(tmp_path / 'rows.jsonl', content)}", f"--output={tmp_path / 'out.jsonl'}",
                   "--batch_tokens=256", *flags)
    assert done.code == 0, done.err
    assert list(tmp_path.glob("*.part")) == []
    return rows(tmp_path / "out.jsonl")


def test_a_policy_gives_the_trainers_log_probs(runs, command, tmp_path):
    """On demonstrations: what the reference gives in a train step, at the tokens that are trained on."""
    found = _score(command, runs / "policy", tmp_path, DEMOS)
    source = load_source(str(runs / "policy"), "--model")
    policy = Policy(source, "--model")
    dataset = data.open_dataset("demo", str(tmp_path / "rows.jsonl"), source.tokenizer, max_length=96, batch_size=3, cache=tmp_path / "cache")
    batch = next(iter(dataset.eval_batches()))
    nets = Networks({}, {"ref": policy.params}, NetworkSpec(policy=policy.config))
    filled = jax.jit(fill_reference)(nets, batch)
    for i, row in enumerate(found):
        n = len(row["token_ids"])
        assert row["token_ids"] == batch.tokens[i, :n].tolist() and not batch.segment_ids[i, n:].any()
        assert row["loss_mask"] == batch.loss_mask[i, :n].tolist() and any(row["loss_mask"])
        assert row["logps"][0] == 0 and len(row["logps"]) == n
        mask = np.array(row["loss_mask"])
        wanted = np.asarray(filled.ref_logps[i, :n])
        np.testing.assert_allclose(np.array(row["logps"])[mask], wanted[mask], atol=2e-5)
        np.testing.assert_allclose(row["completion_logp"], wanted[mask].sum(), atol=1e-4)
    assert found[0]["id"] == "b" and found[0]["prompt"] == "Sort 5 3", "a row keeps its own fields"


def test_forms_may_be_mixed_and_what_was_scored_can_be_scored_again(runs, command, tmp_path):
    content = [DEMOS[1], {"text": "héllo"}, {"token_ids": [1, 7, 9]}, {"token_ids": [1, 7, 9, 5], "loss_mask": [0, 0, 1, 1], "odd": "\ud800"},
               {"prompt": "a", "response": "b", "logps": "mine"}]
    first = _score(command, runs / "policy", tmp_path, content, "--temperature=0.5")
    tokenizer = Tokenizer.byte_level()
    assert first[1]["token_ids"] == [tokenizer.bos_id, *tokenizer.encode("héllo")[0].tolist(), tokenizer.eos_id]
    assert "loss_mask" not in first[1] and "completion_logp" not in first[2]
    assert first[3]["loss_mask"] == [False, False, True, True] and first[3]["odd"] == "\ud800"
    assert first[3]["logps"][:3] == pytest.approx(first[2]["logps"], abs=2e-5)
    assert first[3]["completion_logp"] == pytest.approx(sum(first[3]["logps"][2:]), abs=1e-5)
    assert len(first[4]["logps"]) == len(first[4]["token_ids"]), "the scorer's own field wins"
    again = _score(command, runs / "policy", tmp_path, first, "--temperature=0.5")
    assert again == first
    cooler = _score(command, runs / "policy", tmp_path, first)
    assert cooler[0]["completion_logp"] != first[0]["completion_logp"]


def test_replaced_fields_are_said(runs, command, tmp_path):
    done = command("score", f"--model={runs / 'reward'}", f"--input={write_rows(tmp_path / 'r.jsonl', [{'text': 'a', 'score': 3}])}",
                   f"--output={tmp_path / 'new' / 'o.jsonl'}")
    assert done.code == 0 and done.out.startswith("1 rows of 3 tokens scored; ")
    assert "1 rows had a field 'score' of their own" in done.err


def test_a_reward_model_scores_as_in_its_evaluation(runs, command, tmp_path):
    pairs = [{"prompt": "Sort 5 3", "chosen": "3 5", "rejected": "5 3 5"}, {"prompt": "q", "chosen": "yes", "rejected": "no"}]
    content = [{"prompt": row["prompt"], "completion": row[branch]} for row in pairs for branch in ("chosen", "rejected")]
    found = _score(command, runs / "reward", tmp_path, content)
    assert all("logps" not in row and "completion_logp" not in row and "loss_mask" in row for row in found)
    source = load_source(str(runs / "reward"), "--model")
    dataset = data.open_dataset("preference", write_rows(tmp_path / "pairs.jsonl", pairs), source.tokenizer, max_length=96, batch_size=2,
                                cache=tmp_path / "cache")
    wanted = RewardModel(source, "--model").scores(next(iter(dataset.eval_batches())))
    np.testing.assert_allclose([row["score"] for row in found], wanted.reshape(-1), atol=2e-5)


def test_a_hugging_face_directory_without_a_tokenizer(command, tmp_path):
    """Against the logits that transformers gave."""
    expected = np.load(GOLDEN / "llama" / "expected.npz")
    tokens = expected["tokens"][:2]
    found = _score(command, GOLDEN / "llama", tmp_path, [{"token_ids": row.tolist()} for row in tokens])
    logits = expected["logits"][: tokens.size].reshape(*tokens.shape, -1).astype(np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, ids, wanted in zip(found, tokens, logps, strict=True):
        assert row["logps"][0] == 0
        np.testing.assert_allclose(row["logps"][1:], np.take_along_axis(wanted[:-1], ids[1:, None], 1)[:, 0], atol=2e-4)


def test_precision_and_devices(runs, command, tmp_path):
    content = [{"token_ids": list(range(1, 20))}, {"token_ids": [3, 4]}]
    plain = _score(command, runs / "policy", tmp_path, content)
    split = _score(command, runs / "policy", tmp_path, content, "--fsdp=2", "--tensor=2")
    coarse = _score(command, runs / "policy", tmp_path, content, "--dtype=bfloat16")
    for a, b, c in zip(plain, split, coarse, strict=True):
        np.testing.assert_allclose(a["logps"], b["logps"], atol=2e-5)
        np.testing.assert_allclose(a["logps"], c["logps"], atol=0.2)
        assert a["logps"] != c["logps"]


def test_without_a_template_prompt_and_completion_are_joined(runs, command, tmp_path):
    found = _score(command, runs / "policy", tmp_path, [{"prompt": "ab", "completion": " c"}], "--template=none")
    tokenizer = Tokenizer.byte_level()
    assert found[0]["token_ids"] == [tokenizer.bos_id, *tokenizer.encode("ab c")[0].tolist()]
    assert found[0]["loss_mask"] == [False, False, False, True, True]


def test_rows_longer_than_the_context(runs, command, tmp_path):
    content = [{"token_ids": [1] * n, "n": n} for n in (3, 40, 41, 7)]
    path, out = write_rows(tmp_path / "rows.jsonl", content), tmp_path / "out.jsonl"
    line = ["score", f"--model={runs / 'policy'}", f"--input={path}", f"--output={out}", "--context=30"]
    refused = command(*line)
    assert refused.code == 2 and not out.exists()
    assert f"2 rows are longer than the context of 30 tokens: {path}:2 (40), {path}:3 (41); set --overlong" in refused.err
    done = command(*line, "--overlong=skip")
    assert done.code == 0 and ", 2 skipped;" in done.out and [row["n"] for row in rows(out)] == [3, 7]
    done = command(*line, "--overlong=truncate")
    assert ", 2 truncated;" in done.out and [len(row["logps"]) for row in rows(out)] == [3, 30, 30, 7]
    done = command(*line[:-1], "--context=2", "--overlong=skip")
    assert done.code == 2 and "every row is longer than the context of 2 tokens" in done.err
    longer = command(*line[:-1], "--context=200")
    assert longer.code == 0, "rotary positions go on"


ROW = {"token_ids": [1, 2]}
BAD_ROWS: dict[str, tuple[object, tuple[str, ...]]] = {
    "no form": ({"id": 1}, (":2 row expected token_ids, text, messages, or prompt + completion", '["id"]')),
    "two forms": ({"text": "a", "messages": []}, (":2 row expected one of", '["text", "messages"]', "keep what is to be read")),
    "half a form": ({"prompt": "a"}, (":2 row expected token_ids", '["prompt"]')),
    "no list of ids": ({"token_ids": "1 2"}, (":2 token_ids expected a non-empty list of whole numbers", "'1 2'")),
    "no ids": ({"token_ids": []}, (":2 token_ids expected a non-empty list",)),
    "fractions": ({"token_ids": [1.5]}, (":2 token_ids", "[1.5]")),
    "id too large": ({"token_ids": [1, 264]}, (":2 token_ids expected ids of the model's vocabulary, 0 to 263, got 264",)),
    "id below 0": ({"token_ids": [-1]}, (":2 token_ids", "got -1")),
    "mask of another length": ({"token_ids": [1, 2], "loss_mask": [1]}, (":2 loss_mask expected 2 entries",)),
    "text that is none": ({"text": 3}, (":2 text expected a string, got 3",)),
    "unknown role": ({"messages": [{"role": "robot", "content": "a"}]}, (":2 messages[0].role", "'robot'")),
    "no JSON": ("{", (":2 row expected valid JSON",)),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_one_sentence_with_its_place(case, runs, command, tmp_path):
    row, said = BAD_ROWS[case]
    path, out = write_rows(tmp_path / "rows.jsonl", [ROW, row]), tmp_path / "out.jsonl"
    done = command("score", f"--model={runs / 'policy'}", f"--input={path}", f"--output={out}")
    _complains(done, path, *said)
    assert not out.exists() and not list(tmp_path.glob("*.part"))


def _complains(done, *said: str) -> None:
    assert done.code == 2 and done.out == "", done
    assert done.err.startswith("rlhf-jax: ") and done.err.count("\n") == 1, done.err
    for part in said:
        assert part in done.err, done.err


BAD_LINES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no model": (["--model="], ("--model is missing",)),
    "no output": (["--output="], ("--output is missing",)),
    "no input": (["--input="], ("--input and --config: give exactly one of them, to say what is scored",)),
    "no such input": (["--input=nowhere.jsonl"], ("nowhere.jsonl", "nothing there")),
    "no such model": (["--model=nowhere"], ("--model = 'nowhere'", "does not exist")),
    "output is the input": (["--output={rows}"], ("--output", "is the input")),
    "output is a folder": (["--output={folder}"], ("is a folder",)),
    "temperature": (["--temperature=0"], ("--temperature = 0.0", "above 0")),
    "temperature of a reward model": (["--temperature=0.5", "--model={reward}"], ("--temperature = 0.5", "reward model")),
    "policy": (["--overlong=cut"], ("--overlong", "cut")),
    "context past the table": (["--model={gpt2}", "--context=4000"], ("--context = 4000", "positions")),
    "devices": (["--fsdp=3", "--tensor=3"], ("--fsdp = 3", "9 devices", "8 are here")),
    "division": (["--fsdp=3"], ("--fsdp = 3", "does not divide")),
    "text without a tokenizer": (["--model={gpt2}", "--input={text}"], ("text.jsonl:1 text expected a model with a tokenizer", "write token_ids")),
    "template": (["--template=plan", "--input={talk}"], ("--template = 'plan'", "'plain'")),
    "messages joined": (["--template=none", "--input={talk}"], ("talk.jsonl:1 messages", "no chat template")),
    "typo": (["--modle=x"], ("modle", "model")),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_command_line_is_one_sentence(case, runs, command, tmp_path):
    flags, said = BAD_LINES[case]
    paths = {
        "rows": write_rows(tmp_path / "rows.jsonl", [ROW]), "text": write_rows(tmp_path / "text.jsonl", [{"text": "a"}]), "folder": tmp_path,
        "talk": write_rows(tmp_path / "talk.jsonl", [{"messages": [{"role": "user", "content": "a"}]}]), "gpt2": GOLDEN / "gpt2",
        "reward": runs / "reward",
    }
    line = [f"--model={runs / 'policy'}", f"--input={paths['rows']}", f"--output={tmp_path / 'out.jsonl'}"]
    _complains(command("score", *line, *(flag.format(**paths) for flag in flags)), *said)
    assert not (tmp_path / "out.jsonl").exists()


def _logged(folder: pathlib.Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "step"} for row in metrics(folder)]


SHORT = {"run.steps": 2, "validation.every": 2}


def _cached(command: Command, tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A reference, and its log-probs of the rows of configs/dpo.py:tiny."""
    reference, cached = write_run(tmp_path / "reference", config(kv_heads=1, context=128), seed=1), tmp_path / "cached"
    line = [flag for flag in arguments("dpo", SHORT, tmp_path) if not flag.startswith("--workdir")]
    done = command("score", f"--model={reference}", f"--output={cached}", *line)
    assert done.code == 0 and "tokens of config.data.train and " in done.out and str(cached) in done.out, done.err
    return reference, cached


def test_cached_log_probs_are_those_that_a_step_computes(command, tmp_path):
    """All that a loss and its gradient can see of a reference, in shuffled batches and in those of the validation."""
    experiments = [assemble(*check(tiny("dpo", {**SHORT, "reference_from": str(path)}))) for path in _cached(command, tmp_path)]
    fill = jax.jit(lambda frozen, batch: fill_reference(Networks({}, frozen, experiments[0].spec), batch))
    assert "ref" in experiments[0].frozen and "ref" not in experiments[1].frozen
    for batches in ([one.batch(1) for one in experiments], [next(iter(one.valid_data.eval_batches())) for one in experiments]):
        assert batches[0].seqs.ref_logps is None
        computed, read = fill(experiments[0].frozen, batches[0]).seqs, batches[1].seqs
        assert (computed.tokens == read.tokens).all() and read.ref_logps.min() < -1
        where = read.loss_mask & (read.segment_ids != 0)
        np.testing.assert_allclose(np.where(where, computed.ref_logps, 0), np.where(where, read.ref_logps, 0), atol=2e-5)


@pytest.mark.slow
def test_training_with_cached_references_is_training_with_the_network(command, tmp_path):
    """Same losses, gradients and parameters; the reference is another network than the policy, validation included."""
    reference, cached = _cached(command, tmp_path)
    runs = []
    for name, path in (("network", reference), ("cache", cached)):
        train(tiny("dpo", {**SHORT, "reference_from": str(path)}), str(tmp_path / name))
        runs.append((_logged(tmp_path / name), jax.tree.leaves(load_source(str(tmp_path / name), name).params)))
    (logged, params), (others, twins) = runs
    assert len(logged) == 3 and abs(logged[0]["reward/margin"]) > 0.01, "the reference is not the policy"
    for one, other in zip(logged, others, strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5, atol=1e-6)
    for one, other in zip(params, twins, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


REFUSED: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "rows and a config": ("dpo", ["--input={rows}"], ("--input and --config: give exactly one",)),
    "what the config decides": ("dpo", ["--temperature=0.5"], ("--temperature", "as its config says")),
    "pairs of the batch": ("kto", [], ("--config", "'feedback'")),
    "a reward model": ("dpo", ["--model={reward}"], ("--model = ", "is a reward checkpoint")),
    "another tokenizer": ("dpo", ["--model={llama}"], ("--model = ", "tokenizer")),
    "in use": ("dpo", ["--output={folder}"], ("--output = ", "exists and is not empty")),
    "a mistake in the config": ("dpo", ["--config.objective.bta=1"], ("config.objective.bta",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_caches_of_references(case, runs, command, tmp_path):
    name, flags, said = REFUSED[case]
    paths = {"rows": write_rows(tmp_path / "rows.jsonl", [ROW]), "reward": runs / "reward", "llama": GOLDEN / "llama", "folder": tmp_path}
    line = [flag for flag in arguments(name, {}, tmp_path) if not flag.startswith("--workdir")]
    done = command("score", f"--model={runs / 'policy'}", f"--output={tmp_path / 'out'}", *line, *(flag.format(**paths) for flag in flags))
    _complains(done, *said)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_an_objective_that_asks_the_reference_itself_is_not_served_by_a_cache(command, tmp_path):
    reference = write_run(tmp_path / "reference", config(kv_heads=1, context=128))
    line = [flag for flag in arguments("forward_kl", {}, tmp_path / "run") if not flag.startswith("--workdir")]
    done = command("score", f"--model={reference}", f"--output={tmp_path / 'cached'}", *line)
    assert done.code == 0, done.err
    _complains(command("train", *line, f"--workdir={tmp_path / 'run'}", f"--config.reference_from={tmp_path / 'cached'}"),
               "config.reference_from names no network, or log-probs alone")
    assert not (tmp_path / "run").exists()


def test_what_fails_half_way_leaves_the_earlier_output(runs, command, tmp_path, monkeypatch):
    found = _score(command, runs / "policy", tmp_path, [ROW])

    def interrupted(self, items, finished):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_jax.eval.scoring.Scorer.score", interrupted)
    done = command("score", f"--model={runs / 'policy'}", f"--input={tmp_path / 'rows.jsonl'}", f"--output={tmp_path / 'out.jsonl'}")
    assert done.code == 130
    assert rows(tmp_path / "out.jsonl") == found and not list(tmp_path.glob("*.part"))


def test_help(command):
    done = command("score", "--help")
    assert done.code == 0 and mixed.FORMS.partition(",")[0] in done.out and "--overlong" in done.out
    assert max(map(len, done.out.splitlines())) <= 160
