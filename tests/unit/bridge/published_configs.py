# SPDX-License-Identifier: Apache-2.0
"""The keys of published models' config.json that describe the model, as their authors spell them."""

from typing import Any


def _of(architecture: str, model_type: str, **values: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16", **values}


def _sizes(
    hidden: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int, length: int, **values: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "initializer_range": 0.02,
        "use_cache": True,
        **values,
    }


def _llama(*sizes: int, theta: float | None = 500000.0, **values: Any) -> dict[str, Any]:
    shared = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    base = {} if theta is None else {"rope_theta": theta}
    return _of("LlamaForCausalLM", "llama", **_sizes(*sizes, **(shared | base | values)))


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_scaling": {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    }


def _mistral(*sizes: int, **values: Any) -> dict[str, Any]:
    shared = {"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}
    shared |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": None}
    return _of("MistralForCausalLM", "mistral", **_sizes(*sizes, **(shared | values)))


def _qwen(generation: str, *sizes: int, **values: Any) -> dict[str, Any]:
    shared = {"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu"}
    shared |= {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False}
    shared |= {"use_sliding_window": False, "max_window_layers": sizes[2], "sliding_window": None}
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    if generation != "qwen2":
        shared |= {"attention_bias": False, "head_dim": 128, "rope_scaling": None}
    return _of(architecture[generation], generation, **_sizes(*sizes, **(shared | values)))


def _qwen3_moe(*sizes: int, experts: int, **values: Any) -> dict[str, Any]:
    routed = {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": experts, "num_experts": 128}
    routed |= {"norm_topk_prob": True, "num_experts_per_tok": 8, "output_router_logits": False}
    return _qwen("qwen3_moe", *sizes, **(routed | {"router_aux_loss_coef": 0.001} | values))


def _deepseek(version: int, *sizes: int, **values: Any) -> dict[str, Any]:
    shared = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "ep_size": 1, "seq_aux": True}
    shared |= {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    shared |= {"moe_layer_freq": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False}
    shared |= {"pretraining_tp": 1, "aux_loss_alpha": 0.001}
    architecture = f"DeepseekV{version}ForCausalLM"
    code = {"auto_map": {"AutoModelForCausalLM": f"modeling_deepseek.{architecture}"}}
    return _of(architecture, f"deepseek_v{version}", **_sizes(*sizes, **(shared | code | values)))


def _deepseek_rope(mscale: float) -> dict[str, Any]:
    scaling = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": mscale, "mscale_all_dim": mscale}
    return {"rope_scaling": {**scaling, "original_max_position_embeddings": 4096, "type": "yarn"}}


_V2 = {"first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6}
_V2 |= {"norm_topk_prob": False, "scoring_func": "softmax", **_deepseek_rope(0.707)}
_V3 = {"first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8}
_V3 |= {"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4}
_V3 |= {"routed_scaling_factor": 2.5, "q_lora_rank": 1536, "moe_intermediate_size": 2048, **_deepseek_rope(1.0)}
_V3 |= {"num_nextn_predict_layers": 1}


def _gemma(*sizes: int, **values: Any) -> dict[str, Any]:
    shared = {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256}
    shared |= {"hidden_act": "gelu", "hidden_activation": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    return _of("GemmaForCausalLM", "gemma", **_sizes(*sizes, **(shared | {"rope_scaling": None} | values)))


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    rope = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    return _of(
        "GptOssForCausalLM",
        "gpt_oss",
        **_sizes(2880, 2880, layers, 64, 8, 201088, 131072),
        attention_bias=True,
        attention_dropout=0.0,
        experts_per_token=4,
        head_dim=64,
        hidden_act="silu",
        initial_context_length=4096,
        layer_types=kinds,
        num_experts_per_tok=4,
        num_local_experts=experts,
        output_router_logits=False,
        rms_norm_eps=1e-5,
        rope_scaling={**rope, "rope_type": "yarn", "truncate": False},
        rope_theta=150000,
        router_aux_loss_coef=0.9,
        sliding_window=128,
        swiglu_limit=7.0,
        tie_word_embeddings=False,
    )


def _glm(*sizes: int, **values: Any) -> dict[str, Any]:
    shared = {"attention_bias": True, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu"}
    shared |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8}
    shared |= {"num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5}
    shared |= {"rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False}
    return _of("Glm4MoeForCausalLM", "glm4_moe", **_sizes(*sizes, **(shared | values)))


def _nemotron(*sizes: int, **values: Any) -> dict[str, Any]:
    shared = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "relu2", "mlp_bias": False}
    shared |= {"norm_eps": 1e-5, "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "tie_word_embeddings": False}
    return _of("NemotronForCausalLM", "nemotron", **_sizes(*sizes, **(shared | values)))


_OLMOE = {"attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "hidden_act": "silu"}
_OLMOE |= {"norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8, "output_router_logits": False}
_OLMOE |= {"rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01}

PUBLISHED = {
    "Llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096, theta=None),
    "Llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, 4096, theta=None),
    "CodeLlama-7b": _llama(4096, 11008, 32, 32, 32, 32016, 16384, theta=1000000),
    "Meta-Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "Meta-Llama-3-70B": _llama(8192, 28672, 80, 64, 8, 128256, 8192),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, 128256, 131072, **_llama3_rope(8.0)),
    "Llama-3.1-405B": _llama(16384, 53248, 126, 128, 8, 128256, 131072, **_llama3_rope(8.0)),
    "Llama-3.2-1B": _llama(
        2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, tie_word_embeddings=True, **_llama3_rope(32.0)
    ),
    "Llama-3.2-3B": _llama(
        3072, 8192, 28, 24, 8, 128256, 131072, head_dim=128, tie_word_embeddings=True, **_llama3_rope(32.0)
    ),
    "Llama-3.3-70B-Instruct": _llama(8192, 28672, 80, 64, 8, 128256, 131072, **_llama3_rope(8.0)),
    "Mistral-7B-v0.1": _mistral(4096, 14336, 32, 32, 8, 32000, 32768, rope_theta=10000.0, sliding_window=4096),
    "Mistral-7B-v0.2": _mistral(4096, 14336, 32, 32, 8, 32000, 32768, rope_theta=1000000.0),
    "Mistral-7B-v0.3": _mistral(4096, 14336, 32, 32, 8, 32768, 32768, rope_theta=1000000.0),
    "Mistral-Nemo-Base-2407": _mistral(5120, 14336, 40, 32, 8, 131072, 131072, rope_theta=1000000.0, head_dim=128),
    "Mistral-Small-24B-Base-2501": _mistral(
        5120, 32768, 40, 32, 8, 131072, 32768, rope_theta=100000000.0, head_dim=128
    ),
    "Qwen2-0.5B": _qwen("qwen2", 896, 4864, 24, 14, 2, 151936, 131072, tie_word_embeddings=True),
    "Qwen2-7B": _qwen("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, sliding_window=131072),
    "Qwen2.5-0.5B": _qwen("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, tie_word_embeddings=True),
    "Qwen2.5-1.5B": _qwen("qwen2", 1536, 8960, 28, 12, 2, 151936, 131072, tie_word_embeddings=True),
    "Qwen2.5-3B": _qwen("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, tie_word_embeddings=True),
    "Qwen2.5-7B": _qwen("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, sliding_window=131072, use_mrope=False),
    "Qwen2.5-14B": _qwen("qwen2", 5120, 13824, 48, 40, 8, 152064, 131072, rms_norm_eps=1e-5),
    "Qwen2.5-32B": _qwen("qwen2", 5120, 27648, 64, 40, 8, 152064, 131072, rms_norm_eps=1e-5),
    "Qwen2.5-72B": _qwen("qwen2", 8192, 29568, 80, 64, 8, 152064, 131072, rms_norm_eps=1e-5),
    "Qwen3-0.6B": _qwen("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, tie_word_embeddings=True),
    "Qwen3-1.7B": _qwen("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, tie_word_embeddings=True),
    "Qwen3-4B": _qwen("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, tie_word_embeddings=True),
    "Qwen3-8B": _qwen("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960),
    "Qwen3-14B": _qwen("qwen3", 5120, 17408, 40, 40, 8, 151936, 40960),
    "Qwen3-32B": _qwen("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960),
    "Qwen3-30B-A3B": _qwen3_moe(2048, 6144, 48, 32, 4, 151936, 40960, experts=768),
    "Qwen3-235B-A22B": _qwen3_moe(4096, 12288, 94, 64, 4, 151936, 40960, experts=1536),
    "DeepSeek-V2-Lite": _deepseek(
        2, 2048, 10944, 27, 16, 16, 102400, 163840, **_V2, q_lora_rank=None, moe_intermediate_size=1408,
        n_group=1, topk_group=1, topk_method="greedy", routed_scaling_factor=1.0,
    ),
    "DeepSeek-V2": _deepseek(
        2, 5120, 12288, 60, 128, 128, 102400, 163840,
        **(_V2 | {"n_routed_experts": 160}), q_lora_rank=1536, moe_intermediate_size=1536,
        n_group=8, topk_group=3, topk_method="group_limited_greedy", routed_scaling_factor=16.0,
    ),
    "DeepSeek-V3": _deepseek(3, 7168, 18432, 61, 128, 128, 129280, 163840, **_V3),
    "DeepSeek-R1": _deepseek(3, 7168, 18432, 61, 128, 128, 129280, 163840, **_V3),
    "gemma-2b": _gemma(2048, 16384, 18, 8, 1, 256000, 8192),
    "gemma-7b": _gemma(3072, 24576, 28, 16, 16, 256000, 8192),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "GLM-4.5": _glm(
        5120, 12288, 92, 96, 8, 151552, 131072, first_k_dense_replace=3, moe_intermediate_size=1536,
        n_routed_experts=160, routed_scaling_factor=2.5, use_qk_norm=True,
    ),
    "GLM-4.5-Air": _glm(
        4096, 10944, 46, 96, 8, 151552, 131072, first_k_dense_replace=1, moe_intermediate_size=1408,
        n_routed_experts=128, routed_scaling_factor=1.0, use_qk_norm=False,
    ),
    "OLMoE-1B-7B-0924": _of("OlmoeForCausalLM", "olmoe", **_sizes(2048, 1024, 16, 16, 16, 50304, 4096, **_OLMOE)),
    "Nemotron-4-340B-Base": _nemotron(18432, 73728, 96, 96, 8, 256000, 4096, head_dim=192),
    "Minitron-8B-Base": _nemotron(4096, 16384, 32, 32, 8, 256000, 4096, head_dim=128),
    "Minitron-4B-Base": _nemotron(3072, 9216, 32, 24, 8, 256000, 4096, head_dim=128),
}  # fmt: skip
