"""config.json of public models as they were published, and what each means in ModelConfig's fields, derived by hand.

The second element of an entry lists the keys that transformers 5 writes in place of transformers 4's.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_jax.models.config import ModelConfig, RopeScaling

GONE: Any = object()  # the value of a key that is not there
RUNTIME: dict[str, Any] = dict(
    context=64, dropout=0.0, param_dtype="bfloat16", compute_dtype="float32", scan_layers=False, remat="none", logits_chunk=0
)


def network(**fields: Any) -> ModelConfig:
    """A network with these fields, whatever else is ModelConfig's default."""
    return ModelConfig(**RUNTIME | fields)


def _defaults(theta: float, **more: Any) -> dict[str, Any]:
    """transformers 5's keys in place of a rope_theta without scaling."""
    return {"rope_theta": GONE, "rope_scaling": GONE, "rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


LLAMA3_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
SHORT, LONG = [1.0 + 0.01 * i for i in range(48)], [1.0 + 1.3 * i for i in range(48)]  # of Phi-3-mini-128k's form: 48 = half a head of 96
GEMMA3_LOCAL = {"rope_type": "default", "rope_theta": 10000.0}

# Name → config.json, what transformers 5 writes instead, max_position_embeddings, the network.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], int, ModelConfig]] = {
    "Llama-3.1-8B": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
         "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
         "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
         "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
         "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256},
        {"rope_scaling": GONE, "rope_theta": GONE, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500000.0}, "head_dim": 128},
        131072,
        network(family="llama", vocab_size=128256, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336, rope_theta=500000.0,
                norm_eps=1e-5, tied=False, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context=8192, low_frequency_factor=1.0,
                                                                   high_frequency_factor=4.0)),
    ),
    "Llama-2-7B": (
        {"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
         "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
         "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
         "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
         "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000},
        _defaults(10000.0),
        4096,
        network(family="llama", vocab_size=32000, hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, mlp=11008, rope_theta=10000.0,
                norm_eps=1e-5, tied=False),
    ),
    "Mistral-7B-v0.1": (
        {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
         "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
         "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True,
         "vocab_size": 32000},
        _defaults(10000.0),
        32768,
        network(family="mistral", vocab_size=32000, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336, rope_theta=10000.0,
                norm_eps=1e-5, tied=False, windows=(4096,)),
    ),
    "Qwen2.5-0.5B": (
        {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
         "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
         "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
         "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
         "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936},
        _defaults(1000000.0) | {"sliding_window": None, "layer_types": ["full_attention"] * 24},
        32768,
        network(family="qwen2", vocab_size=151936, hidden=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp=4864, rope_theta=1e6, norm_eps=1e-6,
                tied=True, qkv_bias=True),
    ),
    "Qwen3-0.6B": (
        {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
         "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
         "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
         "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
         "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
         "vocab_size": 151936},
        _defaults(1000000) | {"layer_types": ["full_attention"] * 28},
        40960,
        network(family="qwen3", vocab_size=151936, hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, mlp=3072, rope_theta=1e6,
                norm_eps=1e-6, tied=True, qk_norm="head"),
    ),
    "gemma-2-27b": (
        {"architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
         "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
         "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.02, "intermediate_size": 36864,
         "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
         "pad_token_id": 0, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
         "torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000},
        _defaults(10000.0) | {"tie_word_embeddings": True, "layer_types": ["sliding_attention", "full_attention"] * 23},
        8192,
        network(family="gemma2", vocab_size=256000, hidden=4608, layers=46, heads=32, kv_heads=16, head_dim=128, mlp=36864, rope_theta=10000.0,
                norm_eps=1e-6, tied=True, norm_offset=True, norm_placement="both", activation="gelu_tanh", windows=(4096, 0),
                attention_scale=144**-0.5, attention_softcap=50.0, logits_softcap=30.0, scaled_embedding=True),
    ),
    "gemma-2-2b": (
        {"architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
         "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
         "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
         "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
         "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
         "torch_dtype": "float32", "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000},
        _defaults(10000.0),
        8192,
        network(family="gemma2", vocab_size=256000, hidden=2304, layers=26, heads=8, kv_heads=4, head_dim=256, mlp=9216, rope_theta=10000.0,
                norm_eps=1e-6, tied=True, norm_offset=True, norm_placement="both", activation="gelu_tanh", windows=(4096, 0),
                attention_softcap=50.0, logits_softcap=30.0, scaled_embedding=True),
    ),
    "gemma-3-1b": (
        {"architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
         "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
         "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912,
         "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
         "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
         "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
         "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144},
        {"rope_scaling": GONE, "rope_theta": GONE, "rope_local_base_freq": GONE, "sliding_window_pattern": GONE, "_sliding_window_pattern": 6,
         "layer_types": ((["sliding_attention"] * 5 + ["full_attention"]) * 5)[:26], "use_bidirectional_attention": False,
         "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1000000.0}, "sliding_attention": GEMMA3_LOCAL}},
        32768,
        network(family="gemma3", vocab_size=262144, hidden=1152, layers=26, heads=4, kv_heads=1, head_dim=256, mlp=6912, rope_theta=1e6,
                local_rope_theta=1e4, norm_eps=1e-6, tied=True, norm_offset=True, norm_placement="both", activation="gelu_tanh", qk_norm="head",
                windows=(512, 512, 512, 512, 512, 0), scaled_embedding=True),
    ),
    "gemma-3-4b": (  # states only what differs from transformers' defaults: 8 heads of 256, 4 of them for keys, a vocabulary of 262208
        {"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106],
         "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
         "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
         "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
         "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                           "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}},
        {"text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                         "rope_parameters": {"full_attention": {"factor": 8.0, "rope_type": "linear", "rope_theta": 1000000.0},
                                             "sliding_attention": GEMMA3_LOCAL}, "sliding_window": 1024}},
        131072,
        network(family="gemma3", vocab_size=262208, hidden=2560, layers=34, heads=8, kv_heads=4, head_dim=256, mlp=10240, rope_theta=1e6,
                local_rope_theta=1e4, rope_scaling=RopeScaling(kind="linear", factor=8.0), norm_eps=1e-6, tied=True, norm_offset=True,
                norm_placement="both", activation="gelu_tanh", qk_norm="head", windows=(1024, 1024, 1024, 1024, 1024, 0), scaled_embedding=True),
    ),
    "Phi-3-mini-4k": (
        {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "bos_token_id": 1,
         "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
         "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
         "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
         "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.2",
         "use_cache": True, "vocab_size": 32064},
        _defaults(10000.0, partial_rotary_factor=1.0),
        4096,
        network(family="phi3", vocab_size=32064, hidden=3072, layers=32, heads=32, kv_heads=32, head_dim=96, mlp=8192, rope_theta=10000.0,
                norm_eps=1e-5, tied=False, windows=(2047,)),
    ),
    "Phi-3-mini-128k": (
        {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "embd_pdrop": 0.0,
         "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
         "max_position_embeddings": 131072, "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
         "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
         "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "su"}, "rope_theta": 10000.0, "sliding_window": 262144,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": True, "vocab_size": 32064},
        {"rope_scaling": GONE, "rope_theta": GONE, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": LONG, "short_factor": SHORT, "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0}},
        131072,
        network(family="phi3", vocab_size=32064, hidden=3072, layers=32, heads=32, kv_heads=32, head_dim=96, mlp=8192, rope_theta=10000.0,
                norm_eps=1e-5, tied=False, windows=(262144,),
                rope_scaling=RopeScaling(kind="longrope", factor=32.0, original_context=4096, short_factors=tuple(SHORT), long_factors=tuple(LONG),
                                         attention_factor=math.sqrt(1 + math.log(32) / math.log(4096)))),
    ),
    "OLMo-2-1B": (
        {"architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu",
         "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2",
         "num_attention_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
         "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.48.0",
         "use_cache": False, "vocab_size": 100352},
        _defaults(500000.0),
        4096,
        network(family="olmo2", vocab_size=100352, hidden=2048, layers=16, heads=16, kv_heads=16, head_dim=128, mlp=8192, rope_theta=500000.0,
                norm_eps=1e-6, tied=False, norm_placement="post", qk_norm="full"),
    ),
    "gpt2": (
        {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1,
         "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
         "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
         "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
         "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257},
        {"n_inner": None, "tie_word_embeddings": True, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
         "reorder_and_upcast_attn": False, "add_cross_attention": False},
        1024,
        network(family="gpt2", vocab_size=50257, hidden=768, layers=12, heads=12, kv_heads=12, head_dim=64, mlp=3072, rope_theta=10000.0,
                norm_eps=1e-5, tied=True, norm="layer", activation="gelu_tanh", gated=False, qkv_bias=True, output_bias=True, mlp_bias=True,
                position="learned", positions=1024),
    ),
    "pythia-70m": (
        {"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu", "hidden_size": 512,
         "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
         "num_attention_heads": 8, "num_hidden_layers": 6, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
         "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304},
        {"rotary_emb_base": GONE, "rotary_pct": GONE, "attention_bias": True, "is_decoder": False,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}},
        2048,
        network(family="gpt_neox", vocab_size=50304, hidden=512, layers=6, heads=8, kv_heads=8, head_dim=64, mlp=2048, rope_theta=10000.0,
                norm_eps=1e-5, tied=False, norm="layer", norm_placement="parallel", activation="gelu", gated=False, qkv_bias=True, output_bias=True,
                mlp_bias=True, rotary_dim=16),
    ),
    "Mixtral-8x7B": (
        {"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
         "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
         "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
         "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000},
        _defaults(1000000.0) | {"router_jitter_noise": 0.0, "head_dim": None},
        32768,
        network(family="mixtral", vocab_size=32000, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336, rope_theta=1e6,
                norm_eps=1e-5, tied=False, experts=8, experts_per_token=2, expert_mlp=14336, renormalise=True, balance_coef=0.02),
    ),
    "Qwen3-30B-A3B": (
        {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
         "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
         "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
         "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
         "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
         "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
         "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
        _defaults(1000000.0) | {"num_experts": GONE, "num_local_experts": 128},
        40960,
        network(family="qwen3_moe", vocab_size=151936, hidden=2048, layers=48, heads=32, kv_heads=4, head_dim=128, mlp=6144, rope_theta=1e6,
                norm_eps=1e-6, tied=False, qk_norm="head", experts=128, experts_per_token=8, expert_mlp=768, renormalise=True, balance_coef=0.001),
    ),
}


def version4(name: str, **changes: Any) -> dict[str, Any]:
    """config.json of a public model, with other values."""
    return _without(PUBLISHED[name][0] | changes)


def version5(name: str, **changes: Any) -> dict[str, Any]:
    """The same as transformers 5 writes it."""
    keys = PUBLISHED[name][0] | PUBLISHED[name][1] | changes
    return _without({"dtype" if key == "torch_dtype" else key: value for key, value in keys.items()})


def _without(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not GONE}
