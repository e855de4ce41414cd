"""Small random models of transformers, one per family and option, and what transformers 5.23.0 computes with them.

Never imports rlhf_jax: it runs where torch and transformers are (the extra `conformance`), and writes what the tests compare with:

    python -m tests.models.families.reference_models --out tests/models/families/golden [--only NAME …]

A fixture is a folder that `save_pretrained` wrote, the same configuration in transformers 4's keys where those differ (config_v4.json), and
expected.npz. Shapes are odd on purpose, windows shorter than rows, rows longer than the context before its scaling, and every parameter is drawn
anew, so that none has a neutral value: whatever a conversion drops or confuses shows in the logits.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

V, T, NEW, ORIGINAL = 61, 36, 64, 32  # tokens: vocabulary, row, generated, context before scaling
PROMPTS = (3, 7, 12)  # tokens
MARGIN = 1e-3  # least gap between a greedy choice and its runner-up, nats; forwards in float32 differ by 1e-5
DISTINCT = 8  # least number of different tokens in a greedy row: a short loop would prove little

LLAMA: dict[str, Any] = dict(
    vocab_size=V, hidden_size=20, intermediate_size=36, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
    max_position_embeddings=128, rms_norm_eps=1e-3, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
PHI3 = {key: value for key, value in LLAMA.items() if key != "head_dim"} | dict(  # heads of hidden / heads
    hidden_size=30, num_attention_heads=3, num_key_value_heads=1)
GPT2: dict[str, Any] = dict(
    vocab_size=V, n_positions=112, n_embd=24, n_layer=3, n_head=3, n_inner=56, layer_norm_epsilon=1e-3, bos_token_id=None, eos_token_id=None,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)
NEOX: dict[str, Any] = dict(
    vocab_size=V, hidden_size=24, intermediate_size=56, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=128,
    layer_norm_eps=1e-3, bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
)
GEMMA2 = LLAMA | dict(
    hidden_size=18, intermediate_size=28, num_hidden_layers=5, num_attention_heads=6, sliding_window=5, query_pre_attn_scalar=7,
    attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
)


def _rope(theta: float, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


# Folder → (model_type, task, what config.json says). Heads of 10 features have 5 frequencies: with base 100, wavelengths of 6, 16, 40, 100 and 250.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "lm", LLAMA | _rope(100.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                           original_max_position_embeddings=ORIGINAL)),
    "llama_yarn": ("llama", "lm", LLAMA | _rope(100.0, "yarn", factor=4.0, beta_fast=1.2, beta_slow=0.5, original_max_position_embeddings=ORIGINAL)),
    "llama_linear_tied": ("llama", "lm", LLAMA | _rope(100.0, "linear", factor=4.0) | dict(tie_word_embeddings=True)),
    "llama_dynamic": ("llama", "lm", LLAMA | _rope(100.0, "dynamic", factor=4.0) | dict(max_position_embeddings=112)),
    "llama_biases": ("llama", "lm", LLAMA | _rope(500.0) | dict(attention_bias=True, mlp_bias=True, hidden_act="gelu")),
    "llama_score": ("llama", "score", LLAMA | _rope(500.0) | dict(num_hidden_layers=2)),
    "mistral": ("mistral", "lm", LLAMA | _rope(300.0) | dict(sliding_window=5)),
    "qwen2": ("qwen2", "lm", LLAMA | _rope(300.0) | dict(tie_word_embeddings=True)),
    "qwen2_sliding": ("qwen2", "lm", LLAMA | _rope(300.0) | dict(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen2_score": ("qwen2", "score", LLAMA | _rope(300.0) | dict(num_hidden_layers=2)),
    "qwen3": ("qwen3", "lm", LLAMA | _rope(300.0, "yarn", factor=4.0, attention_factor=1.3, beta_fast=2.0, truncate=False,
                                           original_max_position_embeddings=ORIGINAL)),
    "gemma2": ("gemma2", "lm", GEMMA2 | _rope(200.0)),
    "gemma2_score": ("gemma2", "score", GEMMA2 | _rope(200.0) | dict(num_hidden_layers=3)),
    "gemma3": ("gemma3_text", "lm", LLAMA | dict(
        hidden_size=16, intermediate_size=28, num_hidden_layers=7, sliding_window=5, query_pre_attn_scalar=7, sliding_window_pattern=3,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"], rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}})),
    "phi3": ("phi3", "lm", PHI3 | _rope(300.0, partial_rotary_factor=0.8) | dict(sliding_window=5)),
    "phi3_longrope": ("phi3", "lm", PHI3 | dict(max_position_embeddings=448, original_max_position_embeddings=112) | _rope(
        300.0, "longrope", partial_rotary_factor=0.6, short_factor=[1.1, 1.3, 1.7], long_factor=[1.4, 2.2, 3.9])),
    "olmo2": ("olmo2", "lm", LLAMA | _rope(300.0)),
    "gpt2": ("gpt2", "lm", GPT2),
    "gpt2_score": ("gpt2", "score", GPT2 | dict(n_layer=2)),
    "gpt_neox": ("gpt_neox", "lm", NEOX | _rope(300.0, partial_rotary_factor=0.35)),
    "gpt_neox_sequential": ("gpt_neox", "lm", NEOX | _rope(300.0, partial_rotary_factor=0.5) | dict(
        use_parallel_residual=False, tie_word_embeddings=True, attention_bias=False)),
    "gpt_neox_score": ("gpt_neox", "score", NEOX | _rope(300.0, partial_rotary_factor=0.35) | dict(num_hidden_layers=2)),
    "mixtral": ("mixtral", "lm", LLAMA | _rope(300.0) | dict(
        hidden_size=24, intermediate_size=16, sliding_window=5, num_local_experts=5, num_experts_per_tok=2)),
    "qwen3_moe": ("qwen3_moe", "lm", LLAMA | _rope(300.0) | dict(
        hidden_size=24, num_hidden_layers=4, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=False,
        mlp_only_layers=[1])),
}
EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "wpe.weight")
FINAL_GAIN = ("model.norm.weight", "ln_f.weight", "final_layer_norm.weight")


def config(name: str, task: str) -> Any:
    """A variant's configuration, for a language model ("lm") or a classifier of one label ("score")."""
    model_type, _, keys = VARIANTS[name]
    labels = dict(num_labels=1, pad_token_id=0) if task == "score" else {}
    return AutoConfig.for_model(model_type, **copy.deepcopy(keys | labels))


def build(name: str, seed: int, task: str = "") -> torch.nn.Module:
    """A variant's model in float32, every parameter drawn from `seed`: kernels near unit gain, gains and biases a quarter off neutral."""
    task = task or VARIANTS[name][1]
    factory = AutoModelForSequenceClassification if task == "score" else AutoModelForCausalLM
    model = factory.from_config(config(name, task), attn_implementation="eager", dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=draw)
            if path.endswith(FINAL_GAIN):  # of either sign: else a model with tied embeddings says its last token again and again
                value.copy_(1.5 * noise)
            elif value.ndim == 1:  # its neutral value, 1 for gains and 0 for biases and gains stored minus 1, plus noise
                value.copy_(value.mean().round() + 0.25 * noise)
            elif path.endswith(EMBEDDINGS):
                value.copy_((0.2 if "wpe" in path or "gemma" in name else 0.8) * noise)  # Gemma multiplies by √hidden
            else:
                value.copy_(1.4 * noise * min(value.shape[-2:]) ** -0.5)
    return model


def rows(seed: int) -> dict[str, np.ndarray]:
    """Eight rows of T slots: two full, two padded on the right, two on the left, two packed; [8, T] int32 each. Padding holds any token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, V, (8, T))
    segments = np.zeros((8, T), np.int64)
    segments[:2] = 1
    segments[2, :24] = segments[3, :7] = segments[4, -29:] = segments[5, -11:] = 1
    segments[6] = np.repeat([1, 2], (14, 22))
    segments[7] = np.repeat([1, 2, 3], (5, 20, 11))
    positions = np.zeros_like(segments)
    for row, start, stop in spans(segments):
        positions[row, start:stop] = np.arange(stop - start)
    return {name: value.astype(np.int32) for name, value in dict(tokens=tokens, positions=positions, segment_ids=segments).items()}


def spans(segments: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(row, first slot, last + 1) of every segment."""
    for row, ids in enumerate(segments):
        for number in range(1, ids.max() + 1):
            slots = np.flatnonzero(ids == number)
            yield row, int(slots[0]), int(slots[-1]) + 1


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, np.ndarray]) -> np.ndarray:
    """[8, T, V] float32, zero on padding: padded rows as batches with a mask and positions, segments of packed rows each on its own."""
    out = np.zeros((*batch["tokens"].shape, V), np.float32)

    def run(part: Any, **more: Any) -> np.ndarray:
        return model(input_ids=torch.tensor(batch["tokens"][part]).long(), use_cache=False, **more).logits.float().numpy()

    out[:2] = run(slice(0, 2))
    for pair in (slice(2, 4), slice(4, 6)):
        real = batch["segment_ids"][pair] != 0
        where = torch.tensor(batch["positions"][pair]).long()
        padded = run(pair, attention_mask=torch.tensor(real).long(), position_ids=where)
        out[pair] = np.where(real[:, :, None], padded, 0.0)
    for row, start, stop in spans(batch["segment_ids"]):
        if row >= 6:
            out[row, start:stop] = run((slice(row, row + 1), slice(start, stop)))[0]
    return out


@torch.no_grad()
def scores(model: torch.nn.Module, batch: dict[str, np.ndarray]) -> np.ndarray:
    """[6] float32: a sequence classifier's reading of the rows that are not packed, padded with its pad token, by which it finds the end."""
    real = batch["segment_ids"][:6] != 0
    ids = torch.tensor(np.where(real, batch["tokens"][:6], model.config.pad_token_id)).long()
    mask, where = torch.tensor(real).long(), torch.tensor(batch["positions"][:6]).long()
    return model(input_ids=ids, attention_mask=mask, position_ids=where).logits[:, 0].numpy()


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """NEW tokens [NEW] after one prompt [P], and by how much each beat its runner-up [NEW] nats."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompt).long()[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0, output_logits=True,
                         return_dict_in_generate=True)
    best = torch.stack(out.logits).float()[:, 0].topk(2).values
    return out.sequences[0, len(prompt):].numpy(), (best[:, 0] - best[:, 1]).numpy()


def generations(model: torch.nn.Module, name: str, seed: int) -> dict[str, np.ndarray]:
    """Three prompts [3, P], padded on the left with -1, and their greedy continuations [3, NEW] whose every choice is clear."""
    prompts, tokens, margins = np.full((3, max(PROMPTS)), -1, np.int32), np.zeros((3, NEW), np.int32), np.zeros((3, NEW), np.float32)
    for row, length in enumerate(PROMPTS):
        for attempt in range(500):
            prompt = np.random.default_rng((seed, row, attempt)).integers(1, V, length)
            chosen, gaps = greedy(model, prompt)
            if gaps.min() > MARGIN and len(set(chosen.tolist())) >= DISTINCT:
                break
        else:
            raise RuntimeError(f"{name}: no prompt of {length} tokens has {DISTINCT} different tokens and a margin above {MARGIN}")
        prompts[row, -length:], tokens[row], margins[row] = prompt, chosen, gaps
    return dict(prompts=prompts, generated=tokens, margins=margins)


def bfloat16_error(folder: Path, batch: dict[str, np.ndarray], wide: np.ndarray) -> np.ndarray:
    """[3] nats: mean, 99th percentile and maximum of |Δ log p| over every real token and the vocabulary, when transformers runs in bfloat16."""
    # Not `model.bfloat16()`, which rounds the rotary frequencies too.
    narrow = logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.bfloat16).eval(), batch)
    real = batch["segment_ids"] != 0
    a, b = (torch.tensor(x[real]).log_softmax(-1).numpy() for x in (wide, narrow))
    gap = np.abs(a - b)
    return np.array([gap.mean(), np.quantile(gap, 0.99), gap.max()], np.float32)


def older(keys: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 4 wrote it: rope_theta and rope_scaling apart, no layer_types where a rule gives them."""
    old = {key: value for key, value in keys.items() if key not in ("rope_parameters", "layer_types", "dtype", "transformers_version")}
    rope = dict(keys["rope_parameters"])
    if keys["model_type"] == "gemma3_text":
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    kind, theta, part = rope.pop("rope_type"), rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    if keys["model_type"] == "gpt_neox":
        old |= dict(rotary_emb_base=theta, rotary_pct=part)
    else:
        old |= dict(rope_theta=theta) | ({} if part is None else dict(partial_rotary_factor=part))
    if keys["model_type"] == "phi3":
        rope.pop("original_max_position_embeddings", None)  # beside rope_scaling, where it is already
    # Llama 3 was the first to say "rope_type", Gemma 3 came later; all before them said "type".
    word = "rope_type" if kind == "llama3" or keys["model_type"] == "gemma3_text" else "type"
    old["rope_scaling"] = None if kind == "default" else {word: kind, **rope}
    return old | dict(torch_dtype="float32", transformers_version="4.46.0")


def write(name: str, folder: Path, seed: int = 2) -> None:
    """One fixture, whose config_v4.json is proved to give transformers the same model."""
    shutil.rmtree(folder, ignore_errors=True)
    model = build(name, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    batch = rows(seed)
    score = VARIANTS[name][1] == "score"
    want = scores(model, batch) if score else logits(model, batch)
    keys = json.loads((folder / "config.json").read_text())
    if "rope_parameters" in keys:
        old = older(keys)
        (folder / "config_v4.json").write_text(json.dumps(old, indent=2, sort_keys=True) + "\n")
        twin = type(model)(AutoConfig.for_model(**copy.deepcopy(old), attn_implementation="eager")).eval()
        twin.load_state_dict(model.state_dict())
        np.testing.assert_array_equal(scores(twin, batch) if score else logits(twin, batch), want)
    if score:
        expected = dict(scores=want)
    else:
        expected = dict(logits=want[batch["segment_ids"] != 0], bfloat16_error=bfloat16_error(folder, batch, want)) | generations(model, name, seed)
    np.savez_compressed(folder / "expected.npz", **batch, **expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        write(name, args.out / name)
        print(f"{name}: {sum(path.stat().st_size for path in (args.out / name).iterdir()) // 1000} kB", flush=True)


if __name__ == "__main__":
    main()
