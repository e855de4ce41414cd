"""Small random models of transformers with adapters of PEFT on them, and the logits that both give together (transformers 5.23.0, peft 0.21.2).

Never imports rlhf_jax: it runs where torch, transformers and peft are (the extra `conformance`), and writes what tests/models/hf/test_peft.py reads:

    python -m tests.models.hf.reference_adapters --out tests/models/hf/golden_adapters [--only NAME …]

`bases/NAME` is a model that `save_pretrained` wrote, `NAME` an adapter that PEFT's did, with its logits in expected.npz. Every parameter of a model
is drawn, and A, B and the magnitudes of an adapter too: none has a neutral value.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

V, T = 31, 12  # tokens: vocabulary, row
SPECIAL: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
LLAMA: dict[str, Any] = SPECIAL | dict(
    vocab_size=V, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    max_position_embeddings=64, tie_word_embeddings=False,
)
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama_score": ("llama", LLAMA | dict(num_hidden_layers=2, num_labels=1, pad_token_id=0)),
    "phi3": ("phi3", {key: value for key, value in LLAMA.items() if key != "head_dim"} | dict(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)),
    "gpt2": ("gpt2", SPECIAL | dict(vocab_size=V, n_positions=64, n_embd=12, n_layer=2, n_head=3, n_inner=20)),
    "gpt_neox": ("gpt_neox", SPECIAL | dict(
        vocab_size=V, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False)),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_patterns": ("llama", dict(r=3, lora_alpha=5, target_modules=LINEAR, rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 4},
                                     alpha_pattern={"v_proj": 9, r"layers\.0\.mlp\..*": 2})),
    "llama_some_layers": ("llama", dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[0, 2],
                                        use_rslora=True, lora_dropout=0.25)),
    "llama_dora": ("llama", dict(r=2, lora_alpha=3, target_modules=["q_proj", "k_proj", "down_proj"], use_dora=True)),
    "llama_tables": ("llama", dict(r=2, lora_alpha=4, target_modules=r".*\.layers\.\d+\.mlp\.(gate|up)_proj",
                                   modules_to_save=["embed_tokens", "lm_head"])),
    "llama_score": ("llama_score", dict(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"], task_type="SEQ_CLS")),
    "phi3_lora": ("phi3", dict(r=2, lora_alpha=5, target_modules="all-linear")),
    "phi3_dora": ("phi3", dict(r=3, lora_alpha=4, target_modules=["qkv_proj", "gate_up_proj"], use_dora=True, use_rslora=True)),
    "gpt2_rslora": ("gpt2", dict(r=3, lora_alpha=4, target_modules=["c_attn", "attn.c_proj", "c_fc"], use_rslora=True)),
    "gpt2_dora": ("gpt2", dict(r=2, lora_alpha=3, target_modules=["c_attn", "mlp.c_proj"], use_dora=True, fan_in_fan_out=True)),
    "gpt_neox_lora": ("gpt_neox", dict(r=2, lora_alpha=5, target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"])),
    "gpt_neox_dora": ("gpt_neox", dict(r=2, lora_alpha=5, target_modules=["query_key_value"], use_dora=True)),
}


def tokens() -> np.ndarray:
    """Two rows [2, T] int32."""
    return np.random.default_rng(0).integers(1, V, (2, T)).astype(np.int32)


def base(name: str, seed: int = 0) -> torch.nn.Module:
    """A model in float32, every parameter drawn from `seed`."""
    model_type, keys = BASES[name]
    factory = AutoModelForSequenceClassification if "num_labels" in keys else AutoModelForCausalLM
    model = factory.from_config(AutoConfig.for_model(model_type, **keys), attn_implementation="eager", dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=draw)
            value.copy_(value.mean().round() + 0.25 * noise if value.ndim == 1 else 1.4 * noise * value.shape[-1] ** -0.5)
    return model


def adapted(model: torch.nn.Module, seed: int = 1, **keys: Any) -> PeftModel:
    """The model with an adapter, every parameter of the adapter drawn from `seed`: A and B alike, magnitudes a quarter off the kernel's norms."""
    model = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM"} | keys)).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=draw)
            if "magnitude" in name:
                value.mul_(1.0 + 0.25 * noise)
            elif "lora_" in name:
                value.copy_(0.4 * noise)
            elif "modules_to_save" in name:
                value.copy_(noise * value.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def outputs(model: torch.nn.Module) -> np.ndarray:
    """Logits [2, T, V] of `tokens()`, or a classifier's scores [2]; float32."""
    out = model(input_ids=torch.tensor(tokens()).long()).logits.float().numpy()
    return out[:, 0] if out.ndim == 2 else out


def write(name: str, folder: Path) -> None:
    """One adapter, and the model that it lies on."""
    home, keys = ADAPTERS[name]
    where = folder / "bases" / home
    if not where.exists():
        base(home).save_pretrained(where)
        (where / "generation_config.json").unlink(missing_ok=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    model = adapted(base(home), **keys)
    model.peft_config["default"].base_model_name_or_path = home
    model.save_pretrained(folder / name, save_embedding_layers=False)
    (folder / name / "README.md").unlink(missing_ok=True)
    np.savez_compressed(folder / name / "expected.npz", outputs=outputs(model), base=outputs(base(home)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=tuple(ADAPTERS), default=tuple(ADAPTERS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        write(name, args.out)


if __name__ == "__main__":
    main()
